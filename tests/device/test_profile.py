from __future__ import annotations

import pytest
from pydantic import ValidationError

from mil_cli.device.profile import DeviceProfile, Int8Form


def profile(**changes: object) -> DeviceProfile:
    form = Int8Form(activations="uint8", reduce_range=True)
    return DeviceProfile.model_validate({"name": "board", "int8": form, **changes})


CHANGES: dict[str, object] = {
    "version": 1,
    "name": "other",
    "description": "something else",
    "provider": "OtherExecutionProvider",
    "provider_options": {"a": 1},
    "threads": 2,
    "requires": {"isa": ["avx2"]},
    "int8": {"activations": "int8", "reduce_range": True},
    "weight_bits": [8],
    "preferred_multiple": {"float": 4},
    "price_per_hour": 1.5,
    "watts": 20.0,
    "remote": "elsewhere",
}


@pytest.mark.parametrize("field", sorted(DeviceProfile.model_fields))
def test_a_changed_field_changes_its_own_fingerprint_only(field: str) -> None:
    before, after = profile().field_fingerprints(), profile(**{field: CHANGES[field]}).field_fingerprints()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == (set() if field == "version" else {field})
    same = field in ("version", "description")
    assert (profile().fingerprint() == profile(**{field: CHANGES[field]}).fingerprint()) == same


def test_a_profile_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        profile().threads = 3  # type: ignore[misc]
