"""Wrong labels: cross-entropy against Meta-IADA, and how well each tells which labels are wrong.

    python examples/noisy_labels.py                                         # scikit-learn's digits, a minute or two
    python examples/noisy_labels.py --data cifar10/ --noise flip2 --rate 0.4   # ResNet-32, the paper's setting
    python examples/noisy_labels.py --data cifar10/ --noise uniform         # WRN-28-10
    python examples/noisy_labels.py --data cifar10/ --noise worse_label     # CIFAR-10N: real human noise

--data is a folder with the Parquet files of "cifar10" or "cifar100" (Hugging Face hub), for CIFAR-10N with cifar10n.npz
beside them. The meta set has clean labels and no other part of the data.
"""

from compare import cli, scenarios

from iada_plugin.data.noise import NOISE_KINDS


def main() -> None:
    parser = cli.parser(__doc__, "noisy_labels")
    parser.add_argument("--noise", choices=[*NOISE_KINDS, *scenarios.CIFAR10N, "none"], default="flip2")
    parser.add_argument("--rate", type=float, default=0.4, help="share of noise")
    parser.add_argument("--samples-per-class", type=int, help="default: all")
    parser.add_argument("--meta-per-class", type=int, help="clean samples (default: 1,000 in all; digits: 10)")
    args = parser.parse_args()
    cli.main(args, lambda: scenarios.label_noise(
        args.data, kind=args.noise, rate=args.rate, samples_per_class=args.samples_per_class,
        meta_per_class=args.meta_per_class, image_size=args.image_size, seed=args.seed,
    ))  # fmt: skip


if __name__ == "__main__":
    main()
