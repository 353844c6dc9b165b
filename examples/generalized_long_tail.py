"""Long tails over classes and over attributes within a class (Tang et al., 2022): cross-entropy against Meta-IADA.

    python examples/generalized_long_tail.py                                # scikit-learn's digits, a minute or two
    python examples/generalized_long_tail.py --data cifar10/ --protocol ALT
    python examples/generalized_long_tail.py --data imagenet_sup_intra_lt_inter_lt.json   # ResNeXt-50, as published

--protocol is CLT (long tail over classes), ALT (over attributes) or GLT (both). Attributes of digits and CIFAR are KMeans
clusters, six a class; ImageNet-GLT and MSCOCO-GLT bring theirs in their annotation. The meta set holds two samples of each
class and attribute.
"""

from compare import cli, scenarios


def main() -> None:
    parser = cli.parser(__doc__, "generalized_long_tail")
    parser.add_argument("--protocol", choices=["CLT", "GLT", "ALT"], default="GLT")
    parser.add_argument("--imbalance-ratio", type=float, help="over classes (default: 100, digits: 10)")
    parser.add_argument("--n-max", type=int, help="training samples of the largest class")
    args = parser.parse_args()
    cli.main(args, lambda: scenarios.generalized_long_tail(
        args.data, protocol=args.protocol, imbalance_ratio=args.imbalance_ratio, n_max=args.n_max,
        image_size=args.image_size, seed=args.seed,
    ))  # fmt: skip


if __name__ == "__main__":
    main()
