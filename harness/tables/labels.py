"""What reports call regions and models: words that say what is done, from the labels that the tables hold.

The labels in the tables are keys, by which studies are joined, and they stay as they are. Every text that a person
reads (terminal, Markdown, figures) shows what `region_words` makes of them.
"""

from __future__ import annotations

import functools
import re

_SEED = re.compile(r" seed (\d+)$")
# Control of one region: the beginning of its label -> its words, around those of the region.
_OF_REGION = {
    "random": "random, same count as {}", "random outside": "random outside {}, same count",
    "energy_matched": "random, same energy as {}", "energy_matched outside": "random outside {}, same energy",
    "lower_bulk": "lower bulk, same count as {}", "rotated": "random directions in place of {}",
    "shuffled": "shuffled factors, {}",
    "rotated_output": "random directions with outputs as large as those of {}",
}  # fmt: skip
_WHOLE = {"none": "nothing removed", "other order": "other order of additions"}
_SIZED = {"large": "top", "bulk": "middle", "small": "bottom"}
_REWEIGHT = re.compile(r"(sensitivity|smooth|descent) .+?(?: of (\d+))?( energy)?")
# How the words of a treatment begin, which stand behind the label of a region.
_TREATMENT = re.compile(
    r", (?:of the (?:change|reference)|activations|centred|kept|scaled by [-+.\de]+|mean)(?=,|$)"
)


@functools.lru_cache(maxsize=4096)  # large studies ask for each of their few labels many times
def region_words(label: str) -> str:
    """Return what is done to a matrix, for the label of a region; a label of unknown form is returned unchanged.

    >>> [region_words(label) for label in ("small 0.1", "interval 0.01:1", "random (large 0.1) seed 0")]
    ['bottom 10 %', 'keep top 1 %', 'random, same count as top 10 %']
    """
    if label in _WHOLE:
        return _WHOLE[label]
    seed = _SEED.search(label)
    control, inside, rest = label[: seed.start() if seed else None].partition(" (")
    if inside and rest.endswith(")") and control in _OF_REGION:
        again = "" if seed is None or seed[1] == "0" else f", seed {seed[1]}"
        return _OF_REGION[control].format(_treated(rest[:-1], removal=True)) + again
    return _treated(label, removal=False)


def nominal_interval(label: str) -> tuple[float, float] | tuple[None, None]:
    """Return the interval of the rank that a label asks for, as fractions (start, stop), 0 being the largest value.

    The realised interval differs, because a matrix has a whole number of values. (None, None) for regions that are not
    one interval of the rank.
    """
    name = label[: _treatment_of(label)]
    if found := re.fullmatch(r"decile \d+ \(([\d.]+)-([\d.]+)\)", name):
        return float(found[1]), float(found[2])
    if found := re.fullmatch(r"laser ([-.\de]+)", name):
        return float(found[1]), 1.0
    if found := re.fullmatch(r"interval ([-.\de]+):([-.\de]+)", name):
        return float(found[1]), float(found[2])
    if found := re.fullmatch(r"(large|bulk|small) ([-.\de]+)", name):
        size = float(found[2])
        return {"large": (0.0, size), "bulk": (0.5 - size / 2, 0.5 + size / 2), "small": (1 - size, 1.0)}[found[1]]
    return None, None


def percent(fraction: float) -> str:
    """Return a fraction as a number of percent, without the digits that are due to rounding."""
    return f"{100 * fraction:.6g}"


def model_name(model: str, gguf_file: str | None = None) -> str:
    """Return the short name of a model for titles: the last part of a path or of a name on the hub, or the GGUF file.

    >>> model_name("openai-community/gpt2"), model_name("/data/models/base + /data/adapter")
    ('gpt2', 'base + adapter')
    """
    if isinstance(gguf_file, str) and gguf_file:
        return gguf_file.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return " + ".join(part.rstrip("/").rpartition("/")[2] or part for part in model.split(" + "))


def _treatment_of(label: str) -> int:
    """Return the position at which the words of a treatment begin, the length of the label if there are none."""
    found = _TREATMENT.search(label)
    return found.start() if found else len(label)


def _treated(label: str, removal: bool) -> str:
    """Return the words for a region with its treatment. removal: say which values are meant, not which are kept."""
    at = _treatment_of(label)
    name, treatment = label[:at], label[at:]
    kept = re.search(r", kept(?=,|$)", treatment)
    if kept is None:
        return _region(name, removal or bool(treatment)) + treatment
    rest = treatment[: kept.start()] + treatment[kept.end() :]
    return f"keep {_region(name, removal=True)}{rest}"


def _region(name: str, removal: bool) -> str:
    kind, _, size = name.partition(" ")
    if found := re.fullmatch(r"decile (\d+) \(([\d.]+)-([\d.]+)\)", name):
        return f"decile {found[1]} ({percent(float(found[2]))}-{percent(float(found[3]))} %)"
    if found := re.fullmatch(r"(large|bulk|small|interval) (energy )?([-.\de]+)(?::([-.\de]+))?", name):
        of = " of the energy" if found[2] else ""
        if found[1] == "interval" and found[4]:
            return _interval(float(found[3]), float(found[4]), of, removal)
        if found[1] != "interval" and not found[4]:
            whole = float(found[3]) == 1
            return "whole matrix" if whole else f"{_SIZED[found[1]]} {percent(float(found[3]))} %{of}"
    if kind == "laser" and (found := re.fullmatch(r"[-.\de]+", size)):
        share = float(size)
        return f"bottom {percent(1 - share)} % (LASER)" if removal else f"keep top {percent(share)} % (LASER)"
    if kind == "index":
        return _positions(*size.partition(":")[::2], removal)
    if kind == "component" and re.fullmatch(r"-?\d+", size):
        return _one_value(int(size), ("largest", "smallest"))
    if kind == "component" and (found := re.fullmatch(r"(-?\d+) by loss", size)):
        return _one_value(int(found[1]), ("best predicted", "worst predicted"))
    if kind == "named":
        names = size.split("+")
        return f"value{'s' * (len(names) > 1)} {', '.join(names)}"
    if found := re.fullmatch(r"compression ([-.\de]+)( zero_sum)?", name):
        return f"{percent(float(found[1]))} % fewer parameters" + ", shared budget" * bool(found[2])
    if kind == "reweight" and (found := _REWEIGHT.fullmatch(size)):
        rank = f", rank {found[2]}" if found[2] else ""
        return f"reweighted by {found[1]}{rank}" + ", same energy" * bool(found[3])
    if found := re.fullmatch(r"mp (above|inside|below) (\w+?)( tracy_widom)?", name):
        how = [*([found[2]] if found[2] != "gavish_donoho" else []), *(["Tracy-Widom margin"] if found[3] else [])]
        return f"{found[1]} the Marchenko-Pastur bulk" + (f" ({', '.join(how)})" if how else "")
    if kind == "gavish_donoho":
        return f"{size} the Gavish-Donoho threshold"
    return name


def _interval(start: float, stop: float, of: str, removal: bool) -> str:
    if start == 0 and stop == 1:
        return "whole matrix"
    if stop == 1:
        keeps = start < 0.5 and not removal
        return f"keep top {percent(start)} %{of}" if keeps else f"bottom {percent(1 - start)} %{of}"
    if start == 0:
        keeps = stop > 0.5 and not removal
        return f"keep bottom {percent(1 - stop)} %{of}" if keeps else f"top {percent(stop)} %{of}"
    return f"{percent(start)}-{percent(stop)} %{of or ' of the rank'}"


def _positions(start: str, stop: str, removal: bool) -> str:
    if start in ("", "0") and stop.isdecimal():
        return _values("largest", int(stop))
    if not stop and start.startswith("-"):
        return _values("smallest", -int(start))
    if not stop and start.isdecimal() and int(start):
        return f"all but the {_values('largest', int(start))}" if removal else f"keep {_values('largest', int(start))}"
    return f"values {start}:{stop}"


def _values(which: str, n: int) -> str:
    return f"{which} value" if n == 1 else f"{which} {n} values"


def _one_value(position: int, ends: tuple[str, str]) -> str:
    which, place = (ends[0], position + 1) if position >= 0 else (ends[1], -position)
    if place == 1:
        return f"{which} value alone"
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending} {which} value alone"
