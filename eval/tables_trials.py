"""Tables of ablations and of added items; `tables.py` puts them where they belong."""

from __future__ import annotations

from typing import Any

Found = dict[str, Any]


def ablations(name: str, found: Found) -> str:
    """One row a trial: what it changes, how it ranks, and how that differs from the trial it is held against.

    Parameters
    ----------
    name
        Of the results file, without its ending.
    found
        What the file holds.
    """
    trials: dict[str, Found] = found["trials"]
    first = next(iter(trials.values()))
    lines = [
        f"### {name} (bring data)",
        "",
        f"`eval/ablations.py`: one change at a time; validation, {first['users']['asked']:,} users; "
        "the merge's first 20 are ordered for all or for so many as stand there. NDCG@10; a difference is "
        "that of the trial to the one in brackets, user by user, in the measure named, corrected over all "
        "differences of the table. The gain is that of the blend over the merge without the model, "
        "cross-fitted, with its standard error.",
        "",
        "| trial | events | events/s | nats | alone | first 20 | difference | gain in the blend |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for trial, own in trials.items():
        training, blend = own["training"], own.get("blend")
        cells = [
            f"{trial}: {own['says']}" if own["says"] else f"{trial}",
            f"{training['events']:,}" if "events" in training else "",
            _speed(training["events_per_second"]) if "events_per_second" in training else "",
            f"{own['nats']:.3f}" if "nats" in own else "",
            f"{own['systems']['alone']['ndcg@10']:.4f}" if "alone" in own["systems"] else "",
            _first(own),
            _difference(trial, found),
            f"{blend['gain']:+.4f} ± {blend['standard_error']:.4f}" if blend else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += _detail(trials) + _typed(trials)
    return "\n".join(lines)


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _first(own: Found) -> str:
    """NDCG@10 of the order of the merge's first 20, and of how many users if not of all."""
    if "first 20" not in own["systems"]:
        return ""
    asked, few = own["users"]["asked"], own["users"]["few"]
    value = f"{own['systems']['first 20']['ndcg@10']:.4f}"
    return value if few == asked else f"{value} ({few:,} users)"


def added_items(name: str, found: Found) -> str:
    """One row a mode: how a model ranks items that were added after it was trained."""
    chose = found["who chose an added item"]
    lines = [
        f"### {name} (bring data)",
        "",
        f"`{found['command']}`: {found['added']:,} of {found['items']:,} items are taken out, a model learns "
        "the rest and then knows them by their texts; another learns everything. Validation, "
        f"{found['users']:,} users, {chose:,} of whom chose an added item; lists of ten added and ten "
        "other items. Ahead: share of the pairs of an added and another item in which the added one comes "
        "first; .5 is no preference. First ten: share of added items among the first ten of the catalogue.",
        "",
        "| mode | ahead, grown | retrained | difference | first ten, grown | retrained "
        "| NDCG@10 of an added item, grown | retrained | difference | of another, grown | retrained "
        "| difference |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for mode, own in found["modes"].items():
        tested = {c["metric"]: c for c in found["comparisons"] if c["a"] == f"{mode}, grown"}
        cells = [mode]
        for measure in ("ahead", "first ten", "ndcg@10 of an added item", "ndcg@10 of another"):
            for side in ("grown", "retrained"):
                value = own[side][measure]
                cells.append("" if value is None else f"{value:.3f}")
            if measure in tested:
                low, high = tested[measure]["ci95"]
                told = f"{tested[measure]['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
                cells.append(told + tested[measure]["verdict"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _difference(trial: str, found: Found) -> str:
    """To the trial that it is held against: alone over the catalogue where both rank it."""
    own = {c["of"]: c for c in found["comparisons"] if c["a"] == trial}
    kind = next((k for k in ("alone", "first 20") if k in own), None)
    if kind is None:
        return ""
    low, high = own[kind]["ci95"]
    shown = ", not shown" if own[kind]["verdict"] else ""
    measure = "" if kind == "alone" else ", first 20"
    return f"{own[kind]['difference']:+.4f} [{low:+.4f}, {high:+.4f}]{shown}{measure} (to {own[kind]['b']})"


def _detail(trials: dict[str, Found]) -> list[str]:
    """How many candidates are ordered, and how much of a history is read."""
    lines = []
    for trial, own in trials.items():
        given = [k for k in own["systems"] if k.startswith(("last ", "first "))]
        if len(given) < 2:
            continue
        row = " | ".join(f"{own['systems'][k]['ndcg@10']:.4f}" for k in given)
        lines += [
            "",
            f"| {trial}, NDCG@10 | " + " | ".join(f"{k} items" for k in given) + " |",
            "|---|" + "---|" * len(given),
            f"| of the merge's first ones; alone, with the last ones of a history | {row} |",
        ]
    return lines


def _typed(trials: dict[str, Found]) -> list[str]:
    """Trials that are asked with typed words."""
    asked = {t: own for t, own in trials.items() if "typed" in own["systems"]}
    if not asked:
        return []
    lines = [
        "",
        "| typed words, NDCG@10 | model alone | merge | gain in the blend |",
        "|---|---|---|---|",
    ]
    for trial, own in asked.items():
        blend = own["blend_typed"]
        lines.append(
            f"| {trial} | {own['systems']['typed']['ndcg@10']:.4f} | {blend['merge']:.4f} "
            f"| {blend['gain']:+.4f} ± {blend['standard_error']:.4f} |"
        )
    return lines
