"""A training run that may be killed: ``heard(KIND, FOLDER, connection)`` begins it or takes it up where it was.

It says ("resumes", N), ("step", N), ("saving", N) and ("saved", N) on the way; the end of it is in
``FOLDER/final.safetensors``.
"""

import os
import time
import traceback
from itertools import islice
from pathlib import Path

import torch
from models import ConvNet
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

STEPS, EVERY = 24, 2  # optimizer steps, and of these from one checkpoint to the next
FINAL = "final.safetensors"
PAUSE = 0.005


say = print  # or what :func:`heard` puts in its place


def finish(folder, model, optimizer, iada_state):
    """Everything in one file that is the same byte for byte where the tensors are."""
    found = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"iada.{k}": v for k, v in iada_state.items()}
    state = optimizer.state_dict()
    for index, entry in state["state"].items():
        found |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in entry.items() if v is not None}
    found["lr"] = torch.tensor([group["lr"] for group in state["param_groups"]], dtype=torch.float64)
    partial = Path(folder, FINAL + ".partial")
    save_file({k: v.detach().clone().contiguous() for k, v in found.items()}, partial)
    os.replace(partial, Path(folder, FINAL))


# ------------------------------------------------------------------------------------------------------- a plain loop


def images(n, seed):
    """Four classes; the later, the rarer."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, generator=generator) ** 2 * 4).long()
    labels[:4] = torch.arange(4)
    return TensorDataset(torch.randn(n, 3, 8, 8, generator=generator), labels)


def loop(folder, schedule):
    from iada_plugin import IADAConfig, MetaIADA

    torch.manual_seed(0)
    data = images(36, seed=1)
    per_epoch = 5
    model = ConvNet(dropout=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    iada = MetaIADA(
        model,
        optimizer,
        meta_loader=DataLoader(images(12, seed=2), batch_size=5, shuffle=True),
        steps_per_epoch=per_epoch,
        epochs=STEPS / per_epoch,
        config=IADAConfig(warmup_ratio=1 / 3, schedule=schedule),
    )
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "iada": iada}
    file, step = Path(folder, "checkpoint.pt"), 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
        step = saved["step"]
    say("resumes", step)
    model.train()
    while step < STEPS:
        epoch, seen = divmod(step, per_epoch)
        loader = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(epoch))
        for inputs, labels in islice(loader, seen, seen + STEPS - step):
            optimizer.zero_grad()
            iada(model(inputs), labels).backward()
            optimizer.step()
            scheduler.step()
            step += 1
            time.sleep(PAUSE)
            say("step", step)
            if step % EVERY == 0:
                say("saving", step)
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save({**state, "random": torch.get_rng_state(), "step": step}, f"{file}.partial")
                os.replace(f"{file}.partial", file)
                say("saved", step)
    finish(folder, model, optimizer, iada.state_dict())


# ---------------------------------------------------------------------------------------------------------- a Trainer


def trainer(folder):
    import trainers as here
    from transformers import TrainerCallback, __version__

    from iada_plugin import last_complete_checkpoint

    class First(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            say("resumes", state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            time.sleep(PAUSE)
            say("step", state.global_step)
            if control.should_save:
                say("saving", state.global_step)

        def on_train_end(self, args, state, control, **kwargs):
            self.iada_state = ours.engine.state_dict()  # the engine is gone once train() returns

    class Last(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            say("saved", state.global_step)

    first, ours = First(), here.callback(here.dataset(12, seed=7), warmup_epochs=None, warmup_ratio=1 / 3)
    # Nine micro-batches an epoch are five optimizer steps, the last of one; 4.46 skips too many when it resumes such a run.
    size = 40 if int(__version__.split(".")[0]) < 5 else 36
    run = here.trainer(
        folder, first, train=here.dataset(size), per_device_train_batch_size=4, gradient_accumulation_steps=2,
        max_steps=STEPS, save_strategy="steps", save_steps=EVERY, save_total_limit=2,
    )  # fmt: skip
    run.add_callback(ours)
    run.add_callback(Last())
    run.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    finish(folder, run.model, run.optimizer, first.iada_state)


def heard(kind, folder, connection):
    """In a process of its own: send what is said through ``connection``, and an error too."""
    global say
    import conftest  # noqa: F401 - one thread

    say = lambda word, number: connection.send((word, number))  # noqa: E731
    try:
        if kind == "trainer":
            trainer(folder)
        else:
            loop(folder, {"loop": "lookahead", "loop-online": "online"}[kind])
    except BaseException:
        connection.send(("error", traceback.format_exc()))
        raise
