"""The ``prune`` pass: fewer feed-forward channels, heads or layers, as smaller dense shapes."""
