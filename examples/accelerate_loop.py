"""Meta-IADA in a plain Accelerate loop: several processes, checkpoints, and going on after an interruption.

    python examples/accelerate_loop.py                                                # one process, half a minute
    torchrun --nproc_per_node 2 examples/accelerate_loop.py                           # two, half of each batch on each
    python examples/accelerate_loop.py --output run                                   # ... killed somewhere, and then
    python examples/accelerate_loop.py --output run                                   # goes on where it was saved last

(Killing torchrun itself with SIGKILL leaves its processes running: end those too before starting again in the same folder.)

scikit-learn's digits with 40 % of the labels of each class turned into two others (flip2), and a small network without
BatchNorm, which would see half a batch on each of two processes.
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from iada_plugin import IADAConfig, MetaIADA, balanced_meta_split, meta_dataloader
from iada_plugin.data import noisy_labels


def digits(seed):
    """Training set with wrong labels, clean meta set, test set."""
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    test, rest = balanced_meta_split(y, per_group=40, seed=seed)
    meta, train = balanced_meta_split(y[rest], per_group=10, seed=seed)
    noisy, _ = noisy_labels(y[rest], "flip2", 0.4, num_classes=10, seed=seed)
    x, y, noisy, x_test, y_test = x[rest], y[rest], torch.as_tensor(noisy), x[test], y[test]
    return TensorDataset(x[train], noisy[train]), TensorDataset(x[meta], y[meta]), TensorDataset(x_test, y_test)


def network():
    layers = []
    for inputs, outputs in ((1, 32), (32, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, 10))


def save(accelerator, folder, step):
    """A checkpoint appears whole or not at all."""
    partial, whole = folder / f"partial-{step}", folder / f"step-{step:06d}"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(partial, whole)
        for old in sorted(folder.glob("step-*"))[:-2]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--warmup-epochs", type=float, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="over all processes")
    parser.add_argument("--schedule", choices=("lookahead", "online"), default="lookahead")
    parser.add_argument("--output", type=Path, help="folder of checkpoints; a run goes on from the newest one in it")
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    args = parser.parse_args()

    # Seeded by the epoch, the order of the samples is the same again after an interruption.
    loading = DataLoaderConfiguration(use_seedable_sampler=True)
    # Several processes without a GPU: Accelerate has to be told.
    cpu = args.cpu or (int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available())
    accelerator = Accelerator(cpu=cpu, dataloader_config=loading)
    set_seed(args.seed)
    train, meta, test = digits(args.seed)
    processes = accelerator.num_processes
    loader = DataLoader(train, args.batch_size // processes, shuffle=True)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    # Accelerate steps a schedule once for each process.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    # After prepare. The meta loader is not prepared: it gives each process its share by itself.
    iada = MetaIADA(
        model,
        optimizer,
        meta_loader=meta_dataloader(meta, args.batch_size, seed=args.seed),
        class_counts=torch.bincount(train.tensors[1], minlength=10),
        steps_per_epoch=len(loader),
        epochs=args.epochs,
        config=IADAConfig(warmup_epochs=args.warmup_epochs, schedule=args.schedule, seed=args.seed),
    )
    accelerator.register_for_checkpointing(iada)

    step = 0
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        done = sorted(args.output.glob("step-*"))
        if done:
            accelerator.load_state(str(done[-1]))
            step = int(done[-1].name.split("-")[1])
            accelerator.print(f"going on after step {step}")
    bar = tqdm(total=args.epochs * len(loader), initial=step, disable=not accelerator.is_main_process)
    for epoch in range(step // len(loader), args.epochs):
        model.train()
        loader.set_epoch(epoch)
        skipped = step - epoch * len(loader)
        for input, target in accelerator.skip_first_batches(loader, skipped) if skipped else loader:
            loss = iada(model(input), target)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            step += 1
            bar.update()
            if args.output is not None and step % args.save_every == 0:
                save(accelerator, args.output, step)
        metrics = iada.pop_metrics()
        bar.set_postfix(loss=f"{loss.item():.3f}", **{k[5:]: f"{v:.2f}" for k, v in list(metrics.items())[:2]})
    bar.close()

    iada.close()
    model.eval()
    x, y = (t.to(accelerator.device) for t in test.tensors)
    with torch.no_grad():
        accuracy = (accelerator.unwrap_model(model)(x).argmax(1) == y).float().mean().item()
    accelerator.print(f"test accuracy: {100 * accuracy:.1f} % ({processes} processes, {step} steps)")
    accelerator.end_training()


if __name__ == "__main__":
    main()
