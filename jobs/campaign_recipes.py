"""Recipes of ``jobs/campaign.py``: functions that return a campaign.

The docstring of each is its promise: command, hours and hardware, expected error, sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from jobs import cifar10, imagenet
from orchestrator.campaign.plan import Campaign, CampaignConfig, Member
from orchestrator.config import EvaluationConfig, Protocol, TrackingConfig, TrainConfig

_PAPERS_TESTS = EvaluationConfig(
    protocols=(Protocol.TEN_CROP, Protocol.MULTI_SCALE), splits=("val", "test"), precise_bn_images=51_200
)


def ilsvrc2015() -> Campaign:
    """The paper's ensemble: six models of different depth, two of them 152 layers, tested by 10-crop and multi-scale.
    Which depths the other four had is not published: 34, 50, 101 and 101 with another seed are our choice. Each by the
    recipe of its depth in jobs/imagenet.py; batch norm's statistics over 51,200 images. Not run to its end here.

    Run: python jobs/campaign.py ilsvrc2015 --data /data/ilsvrc2012 --storage /runs
    Takes: 330 hours of one H100, 41 of eight, to train (an estimate: 1,533 images/s of ResNet-50, by multiply-adds)
    Expect: 3.57 % top-5 error on the test set (paper, Table 5), where one model of 152 layers has 4.49 % on the
        validation set by multi-scale (paper, Table 4)
    """
    return Campaign(
        members=(
            _member("r152-a", imagenet.resnet152),
            _member("r152-b", imagenet.resnet152),
            _member("r101-a", imagenet.resnet101),
            _member("r101-b", imagenet.resnet101),
            _member("r50", imagenet.resnet50),
            _member("r34", imagenet.resnet34),
        ),
        config=CampaignConfig(evaluation=_PAPERS_TESTS),
    )


def small() -> Campaign:
    """Three networks of 18, 18 and 34 layers on 64 × 64 pixels by resnet18_64px, for small sets and machines without a
    GPU. With the changes below each trains for 10 epochs, not 30.

    Run: python jobs/campaign.py small --data /data/mini --storage /runs --change schedule.max_epochs=10 \
        --change schedule.policy=steps --change 'schedule.drop_steps=[90]'
    Takes: 9 minutes of 2 CPU cores on 800 photographs of 10 classes (measured: 9 min 9 s, 8 min 50 s, 8 min 49 s)
    Expect: 48.33–51.67 % top-1 error of the average by 10-crop, of members 53.67–69.00 % (three campaigns,
        benchmarks/RESULTS.md); chance is 90 %
    """
    return Campaign(
        members=(
            _member("r18-a", imagenet.resnet18_64px),
            _member("r18-b", imagenet.resnet18_64px),
            _member("r34", imagenet.resnet18_64px, depth=34),
        ),
        config=CampaignConfig(evaluation=replace(_PAPERS_TESTS, precise_bn_images=640)),
    )


def demo() -> Campaign:
    """As small, on the 480 images that ``make demo`` generates, with 8 epochs and two sizes of multi-scale.

    Run: python jobs/campaign.py demo --data build/demo/data --storage build/demo/campaigns
    Takes: 5 minutes of 2 CPU cores (measured: 4 min 41 s)
    Expect: 53.75 % top-1 error of the average by 10-crop, 43.75 % by multi-scale, on 80 images (one run,
        benchmarks/RESULTS.md); chance is 87.5 %
    """
    base = small()
    members = []
    for member in base.members:
        schedule = replace(member.config.schedule, max_epochs=8, plateau_min_steps=30, plateau_max_drops=1)
        rhythm = replace(member.config.rhythm, log_every_steps=10, checkpoint_every_steps=25)
        members.append(replace(member, config=replace(member.config, schedule=schedule, rhythm=rhythm)))
    evaluation = replace(base.config.evaluation, precise_bn_images=320, scales_px=(64, 96))
    return Campaign(tuple(members), replace(base.config, evaluation=evaluation))


def cifar10_resnet20() -> Campaign:
    """Five ResNet-20 of other seeds on CIFAR-10: mean and standard deviation of their test errors.

    Run: python jobs/campaign.py cifar10_resnet20 --data /data/cifar10 --storage /runs
    Takes: 25–31 hours of 2 CPU cores (an estimate, the sum over its members)
    Expect: 8.75 % test error (paper, Table 6: one run)
    """
    return _seeds(5, cifar10.resnet20)


def cifar10_resnet110() -> Campaign:
    """Five ResNet-110 of other seeds on CIFAR-10, as in the paper.

    Run: python jobs/campaign.py cifar10_resnet110 --data /data/cifar10 --storage /runs
    Takes: 150–190 hours of 2 CPU cores (an estimate, the sum over its members)
    Expect: 6.61 ± 0.16 % test error, the best 6.43 % (paper, Table 6)
    """
    return _seeds(5, cifar10.resnet110)


def cifar10_table6() -> Campaign:
    """Table 6 and Figure 6: residual networks of 20 to 110 layers and plain ones of 20 to 56, one seed each.

    Run: python jobs/campaign.py cifar10_table6 --data /data/cifar10 --storage /runs
    Takes: 110–140 hours of 2 CPU cores (an estimate, the sum over its members)
    Expect: 8.75, 7.51, 7.17, 6.97 and 6.43 % test error of the residual networks (paper, Table 6), of the plain
        ones no number: the deeper, the higher in training (paper, Figure 6)
    """
    residual = (cifar10.resnet20, cifar10.resnet32, cifar10.resnet44, cifar10.resnet56, cifar10.resnet110)
    return _seeds(1, *residual, cifar10.plain20, cifar10.plain32, cifar10.plain44, cifar10.plain56)


def cifar10_degradation() -> Campaign:
    """Residual against plain at 56 layers, three seeds each. Give --change schedule.max_steps=… for a piece of the
    set.

    Run: python jobs/campaign.py cifar10_degradation --data /data/cifar10 --storage /runs
    Takes: 92–110 hours of 2 CPU cores (an estimate, the sum over its members)
    Expect: 6.97 % test error of the residual networks (paper, Table 6), the plain ones above (paper, Figure 6, curves
        alone); 3,200 images and 400 steps: 70.4 ± 4.2 against 79.4 ± 2.4 % (benchmarks/RESULTS.md)
    """
    return _seeds(3, cifar10.resnet56, cifar10.plain56)


def _seeds(count: int, *recipes: Callable[[], TrainConfig]) -> Campaign:
    """``count`` members of each recipe, which are tested on the whole test set as it is."""
    members = [
        _member(f"{recipe.__name__}-{letter}" if count > 1 else recipe.__name__, recipe)
        for recipe in recipes
        for letter in "abcdefghij"[:count]
    ]
    evaluation = EvaluationConfig(protocols=(Protocol.ONE_CROP,), splits=("test",))
    return Campaign(
        tuple(members),
        CampaignConfig(evaluation=evaluation, submit=False, tracking=TrackingConfig(experiment="cifar10")),
    )


def _member(name: str, recipe: Callable[[], TrainConfig], depth: int = 0) -> Member:
    config = replace(recipe(), recipe=recipe.__name__)
    if depth:
        config = replace(config, model=replace(config.model, depth=depth))
    return Member(name, config)


ON_CIFAR10 = (cifar10_resnet20, cifar10_resnet110, cifar10_table6, cifar10_degradation)
RECIPES: dict[str, Callable[[], Campaign]] = {
    recipe.__name__: recipe for recipe in (ilsvrc2015, small, demo, *ON_CIFAR10)
}
