"""Which model something was made from: one fingerprint, compared in one place.

Tensors alone do not say it. The same tensors with other heads, another eps or another process
compute something else, so all of these are in the fingerprint, and what differs is named.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any

from ditas_export.artifact_files import differences, sha256_of_tensors
from ditas_export.errors import CheckpointError, OtherModelError
from ditas_export.families.base import FamilyModel, ModelConfig
from ditas_export.families.registry import config_of, record_of
from ditas_export.saved_records import ReadBy, check_fields, from_record


def _read_config(recorded: object) -> ModelConfig:
    """Return a configuration of whatever family; of this program, or as a record has it."""
    return recorded if isinstance(recorded, ModelConfig) else config_of(recorded)


RecordedConfig = Annotated[ModelConfig, ReadBy(_read_config)]
"""A configuration as a field of what is saved; the record names its family."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """A float model: its tensors and its configuration, the process included."""

    tensors_sha256: str  # of the float32 parameters under the published names: `sha256_of_tensors`
    config: RecordedConfig

    def __post_init__(self) -> None:
        """Refuse what is no hash."""
        check_fields(self, CheckpointError)
        if not re.fullmatch(r"[0-9a-f]{64}", self.tensors_sha256):
            raise CheckpointError(f"tensors_sha256={self.tensors_sha256[:40]!r} is no SHA-256")

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of tensors and configuration."""
        text = json.dumps(self.to_dict(), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the identity as JSON values."""
        return {"tensors_sha256": self.tensors_sha256, "config": record_of(self.config)}

    @classmethod
    def from_dict(cls, values: object) -> ModelIdentity:
        """Return the identity that `to_dict` gave.

        Raises:
            CheckpointError: no mapping, an unknown name, or a value that no model has.
        """
        return from_record(cls, values)

    def differences(self, other: ModelIdentity) -> list[str]:
        """Return what differs, as `num_heads 8, now 4`: this one's value, then the other's."""
        return differences(self.to_dict(), other.to_dict())

    def require_same(self, model: ModelIdentity, *, what: str, remedy: str) -> None:
        """Refuse something that was made from another model.

        Args:
            model: the one at hand.
            what: what this is the identity of, such as a file's name.
            remedy: what to do.

        Raises:
            OtherModelError: names every field that differs, and both values.
        """
        if odd := self.differences(model):
            raise OtherModelError(f"{what} was made from another model: {'; '.join(odd)}. {remedy}")


def identity_of(model: FamilyModel) -> ModelIdentity:
    """Return the identity of a float32 model, its tensors hashed."""
    return ModelIdentity(tensors_sha256=sha256_of_tensors(model.state_dict()), config=model.config)
