"""The ways to train that are tried."""

from typing import NamedTuple


class Cell(NamedTuple):
    """One way to train."""

    launcher: str
    teacher: str = "copy"
    checkpointing: str = "off"
    compile: str = "off"
    precision: str = "fp32"
    sharding: str = "whole"
    """Of the teacher."""

    @property
    def lora(self):
        return self.teacher == "lora"

    @property
    def refused(self):
        """Whether an eager cell has to be refused: LoRA's frozen base cannot be shared once it is partitioned."""
        return self.lora and (self.checkpointing == "reentrant" or self.launcher in PARTITIONED)

    @property
    def kind(self):
        """Which model: diffusers' UNet, or a small one where it is compiled, as that takes far less time."""
        return "unet" if self.compile == "off" else "blocks"


PARTITIONED = ("FSDP1", "FSDP2 blocks", "FSDP2 without root", "ZeRO-3")
LAUNCHERS = ("one process", "DDP", "FSDP2 root", "FSDP2 blocks", "ZeRO-2", "ZeRO-3")
TEACHERS, CHECKPOINTING = ("copy", "lora", "module"), ("off", "reentrant", "non-reentrant")
MAIN = [
    Cell(launcher, teacher, checkpointing, compiled, precision)
    for launcher in LAUNCHERS
    for compiled in ("off", "aot_eager")
    for precision in ("fp32", "bf16")
    for teacher in TEACHERS
    for checkpointing in CHECKPOINTING
]
FURTHER = [
    *(Cell(launcher, teacher, compile="inductor") for launcher in LAUNCHERS[:4] for teacher in TEACHERS),
    *(Cell(launcher, teacher) for launcher in ("FSDP1", "FSDP2 without root") for teacher in TEACHERS),
    Cell("FSDP1", checkpointing="non-reentrant"),  # with reentrant checkpoints FSDP1 itself fails, aloud
    *(
        Cell(launcher, "copy", "off", compiled, "fp32", sharding)
        for sharding in ("root", "blocks", "without root")
        for launcher, compiled in (("DDP", "off"), ("FSDP2 blocks", "off"), ("DDP", "aot_eager"))
    ),
]
