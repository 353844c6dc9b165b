"""Groups that training data under-represent: cross-entropy against Meta-IADA, by worst group.

    python examples/subpopulation.py                                  # coloured digits (scikit-learn), a minute or two
    python examples/subpopulation.py --data mnist/                    # Colored MNIST
    python examples/subpopulation.py --data waterbirds/ --dataset waterbirds
    python examples/subpopulation.py --data celeba/ --dataset celeba  # blond hair, by sex

--data is a folder with MNIST's IDX files, with Waterbirds' metadata.csv and images, or with CelebA's list_attr_celeba,
list_eval_partition and img_align_celeba/. The meta set is drawn from the validation data, balanced over groups; the rest of
them selects the epoch by worst-group accuracy. For texts see examples/civilcomments.py.
"""

from compare import cli, scenarios


def main() -> None:
    parser = cli.parser(__doc__, "subpopulation")
    parser.add_argument("--dataset", choices=["colored_mnist", "waterbirds", "celeba"], default="colored_mnist")
    parser.add_argument("--rows", type=int, help="use only so many images (colored_mnist)")
    parser.add_argument("--meta-per-group", type=int, default=20)
    args = parser.parse_args()

    def build() -> scenarios.Scenario:
        if args.dataset == "colored_mnist":
            return scenarios.colored_mnist(
                args.data, rows=args.rows, meta_per_group=args.meta_per_group, seed=args.seed
            )
        if args.data is None:
            raise ValueError(f"--dataset {args.dataset} needs --data, its folder.")
        return scenarios.photographs(
            args.data, dataset=args.dataset, meta_per_group=args.meta_per_group, image_size=args.image_size, seed=args.seed
        )  # fmt: skip

    cli.main(args, build)


if __name__ == "__main__":
    main()
