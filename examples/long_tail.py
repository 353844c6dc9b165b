"""Long-tailed classification: cross-entropy against Meta-IADA, in a plain PyTorch loop.

    python examples/long_tail.py                                     # scikit-learn's digits, a minute or two
    python examples/long_tail.py --data cifar10/                     # CIFAR-10-LT 100:1, ResNet-32, the paper's setting
    python examples/long_tail.py --data ImageNet_LT/ --model resnext50_32x4d
    python examples/long_tail.py --data reuters52.parquet            # texts: Reuters R52

--data is a folder with the Parquet files of "cifar10" or "cifar100" (Hugging Face hub), a folder with *_train.txt and
*_test.txt image lists (ImageNet-LT, Places-LT, iNaturalist 2018), or a Parquet file with the columns text, label, split.
The meta set is taken from the training data first, ten samples a class; then the tail is cut.
"""

from compare import cli, scenarios


def main() -> None:
    parser = cli.parser(__doc__, "long_tail")
    parser.add_argument("--imbalance-ratio", type=float, help="largest over smallest class (default: 100, digits: 20)")
    parser.add_argument("--n-max", type=int, help="training samples of the largest class (default: all of them)")
    parser.add_argument("--meta-per-class", type=int, default=10)
    args = parser.parse_args()
    cli.main(args, lambda: scenarios.long_tail(
        args.data, imbalance_ratio=args.imbalance_ratio, n_max=args.n_max, meta_per_class=args.meta_per_class,
        image_size=args.image_size, seed=args.seed,
    ))  # fmt: skip


if __name__ == "__main__":
    main()
