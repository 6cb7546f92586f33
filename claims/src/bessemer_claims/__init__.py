"""What a popular account says of DeepSeek-V3 and R1, claim by claim: reproduced, computed, audited, or refused."""

from enum import StrEnum


class Part(StrEnum):
    """The families of runs, each a module of this package; none: no runs."""

    pretrain = "pretrain"
    zero = "zero"
    machine = "machine"
    fp8 = "fp8"
    long = "long"
    none = "none"


PARTS = tuple(part.value for part in Part if part is not Part.none)
