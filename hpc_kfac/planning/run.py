"""The run that is planned for, out of its run file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from hpc_kfac.cluster.errors import InputError
from hpc_kfac.cluster.ranks import underscored
from hpc_kfac.distributed import Kaisa
from hpc_kfac.options.schedule import Schedule
from hpc_kfac.planning.model_costs import ModelCosts, model_costs
from hpc_kfac.planning.times import Settings
from hpc_kfac.tasks.models_text import GPT, Bert
from hpc_kfac.tasks.models_vision import imagenet_resnet
from hpc_kfac.tasks.outlines import IMAGENET_CLASSES, Outline, outline
from hpc_kfac.training import config
from hpc_kfac.training.setup import make_optimizer
from hpc_kfac.training.weights import freeze

AUTOCAST = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Run:
    """What is planned for.

    Attributes:
        given: the run file's settings.
        outline: its model.
        settings: what bears on time and memory.
        placement: of the run file.
        schedule: of the run file.
    """

    given: config.Settings
    outline: Outline
    settings: Settings
    placement: Kaisa
    schedule: Schedule

    def costs(self) -> ModelCosts:
        """The model's figures.

        Raises:
            InputError: nothing of the model can be captured.
        """
        run = self.given.run
        try:
            return model_costs(
                self.outline,
                lambda model: make_optimizer(self.given.parts, model),
                run.skip,
                lambda model: freeze(model, run.freeze),
            )
        except ValueError as error:
            raise InputError(str(error)) from error


def read_run(arguments: Sequence[str], model: str | None = None) -> Run:
    """The run of a run file and settings of the command line, with one of the named models in place of its task's.

    Raises:
        InputError: anything wrong in them.
    """
    given = config.parse([underscored(word) for word in arguments])
    parts, options = given.parts, given.run
    control = None if parts["method"].make is None else parts["step_control"]()
    settings = Settings(
        parts["method"](),
        parts["precision"](),
        control,
        given.settled.fisher,
        AUTOCAST[options.autocast],
        options.averaging,
        options.accumulation_steps,
    )
    found = named(model) if model is not None else outline(parts["task"].name, parts["task"].settings, parts["task"])
    return Run(given, found, settings, parts["placement"](), parts["schedule"]())


def named(name: str) -> Outline:
    """A model by name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in MODELS:
        raise InputError(f"--model is {name!r}; choose one of {', '.join(MODELS)}, or name a task in a run file")
    return MODELS[name]


MODELS = {
    entry.name: entry
    for entry in (
        Outline("resnet50", partial(imagenet_resnet, 50, IMAGENET_CLASSES), (3, 224, 224)),
        Outline("bert_large", Bert, (512,), 30522),
        # 48 blocks of 12 x 4096^2, and 50 257 tokens twice: 10.1e9 parameters.
        Outline("gpt_10b", partial(GPT, 50257, 2048, 4096, 48, 32), (2048,), 50257),
    )
}
