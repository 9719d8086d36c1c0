"""The ``prune`` pass: fewer channels, heads or layers, as smaller dense shapes."""

from memc.passes.prune.site import Prune as Prune
