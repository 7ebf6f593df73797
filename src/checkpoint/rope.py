"""The rotation in a `config.json`: transformers 4's `rope_scaling`, 5's `rope_parameters`, or both.

Versions read one or the other, and some of it from the top: what they would disagree on is refused.
"""

from src.errors import UserError
from src.models.hf_config import config_from_hf

_KEYS = ("rope_scaling", "rope_parameters")


def one_rope(raw: dict, where: str) -> dict:
    """A `config.json` with the rotation under one key, as transformers 5 would take it.

    It reads `rope_scaling` alone where that is set: so a scaling that was added beside
    `rope_parameters` without one counts. Raises UserError where two places say different things.
    """
    parts = {key: raw[key] for key in _KEYS if isinstance(raw.get(key), dict) and raw[key]}
    for key, part in parts.items():
        nested = [
            name for name in part if isinstance(part[name], dict) or name.endswith("_attention")
        ]
        if nested:
            raise UserError(
                f"{where}: {key} has a rotation of its own for {nested[0]}; one for all layers is "
                f"supported: write its values into {key} itself, if all layers have the same"
            )
        kinds = [part[name] for name in ("rope_type", "type") if part.get(name) is not None]
        if len(set(map(str, kinds))) > 1:
            raise UserError(
                f"{where}: {key} has rope_type {kinds[0]!r} and type {kinds[1]!r}, of which "
                "transformers 5 reads the one and 4 the other; remove what is not meant"
            )
    # The base may stand in each part and on top: 4 reads it there, 5 in the part.
    places = {"rope_theta": raw.get("rope_theta")}
    places |= {f"{key}.rope_theta": part.get("rope_theta") for key, part in parts.items()}
    bases = {place: base for place, base in places.items() if base is not None}
    for place, base in bases.items():
        first = next(iter(bases))
        if base != bases[first]:
            raise UserError(
                f"{where}: {first} is {bases[first]} and {place} is {base}; "
                "versions of transformers differ in which they read: set both to what is meant"
            )
    if len(parts) < 2:
        return raw
    if list(bases) == ["rope_parameters.rope_theta"]:
        raise UserError(
            f"{where}: rope_theta is {bases['rope_parameters.rope_theta']} in rope_parameters, "
            "which transformers does not read beside rope_scaling "
            f"{parts['rope_scaling']}; write all of it into one of the two"
        )
    scaling, parameters = (
        config_from_hf(raw | {other: None}, where).rope_scaling for other in reversed(_KEYS)
    )
    if parameters not in (None, scaling):
        raise UserError(
            f"{where}: rope_scaling is {parts['rope_scaling']} and rope_parameters is "
            f"{parts['rope_parameters']}: two scalings, of which transformers reads the first; "
            "remove what is not meant"
        )
    return raw | {"rope_parameters": None}
