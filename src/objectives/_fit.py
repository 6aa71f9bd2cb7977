"""Whether the objectives of a task fit its layout, its fields and each other, before anything is compiled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from src.interfaces import Field, Layout, Objective, row_of


def check_objectives(
    where: str, layout: Layout, objectives: Mapping[str, Objective], fields: Mapping[str, Field]
) -> None:
    """Raises ValueError, naming `<where>.<objective>`, for an objective that is about names that the task does not
    have, that predicts tokens which the trunk sees, or that adds noise which it does not see."""
    have = [name for segment in layout.segments for name in segment.names]
    noised: dict[str, str] = {}
    for label, objective in objectives.items():
        at = f"{where}.{label}"
        if missing := [name for name in objective.names if name not in have]:
            raise ValueError(f"{at} is about {missing}, but the task has {have}")
        if getattr(objective, "predicts_next", False):
            _check_next(at, layout, objective)
        if getattr(objective, "trains_codec", False):
            for name in objective.names:
                if not fields[row_of(name)].learned:
                    raise ValueError(
                        f"{at} trains the codec of {name!r}, but fields.{row_of(name)} has no learned one: give it the"
                        " group `learned`"
                    )
        if getattr(objective, "adds_noise", False):
            _check_noise(at, layout, objective, fields)
            for name in objective.names:
                if name in noised:
                    raise ValueError(f"{at} adds noise to {name!r}, as {noised[name]} does: keep one of the two")
                noised[name] = label
    for label, objective in objectives.items():
        for name in objective.names:
            in_place = layout.segment(name).role == "noisy" and noised.get(name, label) != label
            if in_place and getattr(objective, "predicts_next", False):
                raise ValueError(
                    f"{where}.{label} predicts {name!r} from tokens that {noised[name]} adds noise to: give the"
                    " template's segment role=copies, which keeps the clean tokens beside the noisy ones"
                )


def _check_next(at: str, layout: Layout, objective: Objective) -> None:
    for name in objective.names:
        if max(layout.segment(name).sizes()) > 1:
            raise ValueError(
                f"{at} predicts the next token of {name!r}, but its tokens see those behind them: give the template's"
                " segment blocks=causal"
            )


def _check_noise(at: str, layout: Layout, objective: Objective, fields: Mapping[str, Field]) -> None:
    for name in objective.names:
        field = fields[row_of(name)]
        if field.process is None:
            raise ValueError(f"{at} adds noise to {name!r}, but fields.{field.name} has no process: give it one")
        if layout.segment(name).role == "clean":
            raise ValueError(
                f"{at} adds noise to {name!r}, but the network gets its clean tokens: give the template's segment"
                " role=noisy or role=copies"
            )
        if getattr(objective, "hint", 0) and not field.hint:
            raise ValueError(
                f"{at} has hint={objective.hint:g}, but fields.{field.name}.hint is not set: set it to True"
            )
        loss = getattr(objective, "losses", {}).get(name)
        if lacks := [need for need in getattr(loss, "needs", ()) if not hasattr(field.process, need)]:
            raise ValueError(
                f"{at}: the loss {type(loss).__name__} does not fit the process of fields.{field.name},"
                f" {type(field.process).__name__}, which has no {lacks[0]}: choose another loss or process"
            )


def check_hints(objectives: Iterable[Objective], fields: Mapping[str, Field]) -> None:
    """Raises ValueError for a field that reads its own estimate in sampling, and in no objective."""
    hinted = {row_of(name) for objective in objectives if getattr(objective, "hint", 0) for name in objective.names}
    for name, field in fields.items():
        if field.hint and name not in hinted:
            raise ValueError(
                f"fields.{name}.hint is set, but no objective about it has hint above 0: set it there, too"
            )
