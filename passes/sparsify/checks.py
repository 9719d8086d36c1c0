"""Which values of the options go together, whatever the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memc import sites
from memc.dialect.quantised_attention import BITS
from memc.dialect.selectors import SELECTORS
from memc.errors import MemcError


def check_bits(bits: int, method: str) -> None:
    """Raise ``MemcError`` E203 for a number of bits that there is not, or that a method cannot rank by."""
    if bits not in (0, *BITS):
        reason = f"option 'bits' is 0 or one of {', '.join(map(str, BITS))}"
        raise MemcError("E203", reason, f"sparsify:bits={bits}", "write sparsify:method=bounds,bits=4")
    if bits and method != "bounds":
        message = f"bits go with method=bounds, by which keys are both rounded and ranked, not with {method}"
        where = f"sparsify:method={method},bits={bits}"
        raise MemcError("E203", message, where, f"write sparsify:method=bounds,bits={bits}")


def check_compensation(retrieve: str, *, compensation: bool) -> None:
    """Raise ``MemcError`` E203 for a mean of what was dropped where nothing is."""
    if compensation and retrieve == "all":
        message = "no head streams, so that none has dropped a token whose mean it could read"
        raise MemcError("E203", message, "sparsify:compensation=true", "add retrieve=heads:50%, or leave it out")


def check_levels(levels: int, beam: int, *, method: str, bits: int) -> None:
    """Raise ``MemcError`` E203 where there are no two levels of what pages are ranked by, or ``beam`` is of none."""
    where = f"sparsify:method={method},levels={levels}"
    if levels == 1 and beam:
        raise MemcError("E203", "only two levels have a beam", f"{where},beam={beam}", "write levels=2, or no 'beam'")
    if levels == 2 and method != "bounds":
        message = (
            f"what {method} holds of pages bounds nothing above them: the bounds of a super-page hold for its pages"
        )
        raise MemcError("E203", message, where, "write sparsify:method=bounds,levels=2, or leave 'levels' out")
    if levels == 2 and bits:
        message = "pages of keys in few bits are ranked in one level: their bounds are read for the codes anyway"
        raise MemcError("E203", message, f"{where},bits={bits}", "leave 'levels' or 'bits' out")


def check_refresh(refresh: int, *, method: str, window: int, bits: int) -> None:
    """Raise ``MemcError`` E203 where a choice cannot serve ``refresh`` tokens, or would save nothing by it."""
    where = f"sparsify:method={method},refresh={refresh}"
    if refresh > 1 and SELECTORS[method].extends:
        message = f"{method} rotates all that it reads for every token, beside which choosing costs little"
        raise MemcError("E203", f"{message}: each chooses for itself", where, "leave 'refresh' out")
    if refresh > 1 and bits:
        message = "keys and values in few bits are chosen for each token: bounds are read for their codes anyway"
        raise MemcError("E203", message, f"sparsify:bits={bits},refresh={refresh}", "leave 'refresh' out")
    if refresh > window:
        message = f"the last of {refresh} tokens that share a choice misses what is newer: the window holds {window}"
        hint = f"write sparsify:refresh={window}, or a window of {refresh}"
        raise MemcError("E203", message, f"sparsify:refresh={refresh},window={window}", hint)


def check_events(options: Mapping[str, Any], *, method: str, rerank: int, refresh: int, mass: float) -> None:
    """Raise ``MemcError`` E203 for ``options`` of events that were set where there are none, or what excludes them."""
    if not SELECTORS[method].eventful:
        if options:
            names = ", ".join(options)
            where = f"sparsify:method={method},{','.join(f'{name}={value}' for name, value in options.items())}"
            raise MemcError("E203", f"only em has events, which {names} is of", where, f"leave out {names}")
        return
    where = f"sparsify:method={method}"
    if rerank > 1:
        message = "events are read whole, and their tokens not ranked one by one"
        raise MemcError("E203", message, f"{where},rerank={rerank}", "leave 'rerank' out")
    if refresh > 1:
        message = "which events a token sees changes with every token: each chooses for itself"
        raise MemcError("E203", message, f"{where},refresh={refresh}", "leave 'refresh' out")
    if mass < 1:
        message = "tokens that score as their event does say nothing of the share that it holds"
        raise MemcError("E203", message, f"{where},mass={mass:g}", "leave 'mass' out")


def check_mass(mass: float, *, method: str, bits: int) -> None:
    """Raise ``MemcError`` E203 where no share of the attention can be told by what is scored, or none be chosen by."""
    where = f"sparsify:method={method},mass={mass:g}"
    if mass == 0:
        raise MemcError("E203", "a share of 0 is held by nothing: 'mass' is above 0", where, "leave 'mass' out")
    if mass < 1 and SELECTORS[method].searches:
        name = "a choice in two levels" if SELECTORS[method].choice == "levels" else method
        message = f"{name} scores too few pages to tell what share of the attention they hold"
        raise MemcError("E203", message, where, "write sparsify:method=bounds or leave 'mass' out")
    if mass < 1 and SELECTORS[method].extends:
        message = f"{method} has to count what it reads beforehand, and takes as many pages as the budget holds"
        raise MemcError("E203", message, where, "leave 'mass' out")
    if mass < 1 and bits:
        message = "of keys and values in few bits as many are taken as the budget holds"
        raise MemcError("E203", message, f"sparsify:bits={bits},mass={mass:g}", "leave 'mass' or 'bits' out")


def check_landmarks(method: str, *, page: int, rerank: int) -> None:
    """Raise ``MemcError`` E203 for options that do not go with pages that are read through their landmarks."""
    if rerank > 1:
        message = f"{method} spreads a weight over whole pages, whose tokens are not ranked one by one"
        raise MemcError("E203", message, f"sparsify:method={method},rerank={rerank}", "leave 'rerank' out")
    if page == 1:
        message = "the last token of a page stands for the others, of which a page of 1 has none"
        raise MemcError("E203", message, f"sparsify:method={method},page=1", "leave 'page' out, or write page=16")


def check_budget(budget: int, *, page: int, sinks: int, window: int, least: int) -> None:
    """Raise ``MemcError`` E203 for a budget that is not whole pages, or under the ``least`` for sinks and window."""
    where = f"sparsify:budget={budget},page={page},sinks={sinks},window={window}"
    if budget % page:
        more = max(least, -(-budget // page) * page)
        message = f"a budget of {budget} is not whole pages of {page}"
        raise MemcError("E203", message, where, f"write sparsify:budget={more}")
    if budget < least:
        message = f"the pages of {sinks} sinks and a window of {window} may hold {least} tokens"
        raise MemcError("E203", f"{message}, the budget {budget}", where, f"write sparsify:budget={least}")


def check_extending(method: str, *, page: int, window: int, rerank: int, retrieve: str) -> None:
    """Raise ``MemcError`` E203 for options that do not go with a method that reads beyond the trained length."""
    if rerank > 1:
        message = f"{method} reads pages whole, whose tokens are not ranked one by one"
        raise MemcError("E203", message, f"sparsify:method={method},rerank={rerank}", "leave 'rerank' out")
    if retrieve != "all":
        message = f"heads that stream read sinks at their true distance, which {method} is there to bound"
        raise MemcError("E203", message, f"sparsify:method={method},retrieve={retrieve}", "leave 'retrieve' out")
    if method == "infllm" and window < page:
        message = f"a page of {page} is described by queries within the window of {window}"
        where = f"sparsify:method={method},page={page},window={window}"
        raise MemcError("E203", message, where, f"write sparsify:method={method},page={page},window={page}")


def check_retrieve(retrieve: str) -> None:
    """Raise ``MemcError`` E203 for heads that are named in none of the ways there are."""
    share = sites.decay_share(retrieve)
    if (
        retrieve == "all"
        or (share is not None and 0 < share < 1)
        or sites.check_heads("sparsify", retrieve, "retrieve")
    ):
        return
    message = "option 'retrieve' is all, heads:P%, decay:P% or heads:[LAYER.HEAD,...], P between 0 and 100"
    next_step = "write sparsify:retrieve=heads:50% or sparsify:retrieve=decay:50%"
    raise MemcError("E203", message, f"sparsify:retrieve={retrieve}", next_step)
