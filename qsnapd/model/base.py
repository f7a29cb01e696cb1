"""What every type of the model shares: immutable, and strangers are an error."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Base of everything that is stored or crosses the control socket."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
