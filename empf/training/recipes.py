"""What a run begins with unless its flags say otherwise: what goes with its data set, or a recipe that has a name."""

# What differs from the defaults of TrainConfig (near the authors' recipe for CIFAR) unless given on the command line.
OF_DATA = {
    "digits": dict(
        width=0.25,
        epochs=30,
        lr=0.05,
        warmup_epochs=2.0,
        mixup=0.0,
        cutmix=0.0,
        label_smoothing=0.0,
        flip=False,
        threads=1,  # as fast as two at this size, and no slower where others use the cores
    ),
    "imagenet1k": dict(arch="resnet34", workers=8),
    "dvs-cifar10": dict(arch="vgg_snn", T=10, mixup=0.0, cutmix=0.0),
}
OWN_EVENTS = dict(orientation="upright", flip=False)  # of recordings of one's own, on top of that of dvs-cifar10

# The same in a short training of cifar10, cifar100 and images of one's own (bench/recipe.py): mixing images only pays
# in a long one.
SHORT_EPOCHS = 30
SHORT = dict(optimizer="muon", lr=0.1, threshold=0.1, mixup=0.0, cutmix=0.0, label_smoothing=0.0)

# By name, with --recipe, on top of what goes with the data set.
NAMED = {
    # Of arXiv 2410.07547 for CIFAR, as far as it is known. The side of Cutout is from earlier code of theirs, for
    # CIFAR-100; for CIFAR-10 it has 16. --weights, --neuron, --seca and --parallel are left to the experiment.
    "authors": dict(
        optimizer="sgd", lr=0.01, weight_decay=5e-4, decay_all=True, batch_size=64, epochs=300, schedule="cosine",
        warmup_epochs=0.0, mixup=0.8, cutmix=1.0, label_smoothing=0.1, crop=True, flip=True, auto_augment="cifar",
        cutout=8, mixed_precision="bf16", latent_init="positive", stem_init="normal", shortcut="current",
        granularity="layer", seca_bias=True,
    )
}  # fmt: skip


def begun_with(recipe: str, kind: str, own: bool, epochs: int) -> dict:
    """The settings of a recipe (default, or one of `NAMED`) for a kind of data set; `own`: recordings of one's own."""
    named, short = NAMED.get(recipe, {}), kind not in (*OF_DATA, "imagenet200") and epochs <= SHORT_EPOCHS
    return (SHORT if short and not named else OF_DATA.get(kind, {})) | named | (OWN_EVENTS if own else {})


def in_recipes(name: str, default: object) -> str:
    """What recipes have for a setting in place of its default, for people."""
    found = {dataset: values[name] for dataset, values in OF_DATA.items() if name in values}
    if name in SHORT:
        found[f"cifar and own images, up to {SHORT_EPOCHS} epochs"] = SHORT[name]
    found |= {f"--recipe {recipe}": values[name] for recipe, values in NAMED.items() if name in values}
    return "".join(f"; {where}: {value}" for where, value in found.items() if value != default)
