"""GPU tests skip, with the reason, where there is no GPU that a mechanism runs on."""

from dataclasses import replace

import pytest
import torch

from cute_attn import api, kvcache, launch, layouts


def pytest_collection_modifyitems(items):
    """Mark every test under tests/gpu, and skip it without a CUDA GPU."""
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))


@pytest.fixture(autouse=True)
def planned_anew(monkeypatch):
    """How calls were planned is of each test alone: some change which kernels there are."""
    monkeypatch.setattr(api, "_kept", {})
    monkeypatch.setattr(kvcache, "_steps", {})


@pytest.fixture(params=["tma_wgmma", "cp_async"])
def mechanism(request):
    """Each mechanism the GPU has."""
    try:
        target = layouts.target_of(torch.cuda.get_device_capability())
    except NotImplementedError as error:
        pytest.skip(str(error))
    if request.param not in layouts.for_target(target).MECHANISMS:
        pytest.skip(f"{target} has no {request.param}")
    return request.param


@pytest.fixture
def in_one_configuration(monkeypatch):
    """A rectangle's length, or the mean of ragged sequences', may choose other tiles, and with them other last bits."""
    monkeypatch.setattr(launch, "takes_short", lambda *_: False)
    monkeypatch.setattr(launch, "rows_of_query_tile", lambda rows, *_: rows[0])
    monkeypatch.setattr(launch, "takes_one_kernel", lambda *_: False)


@pytest.fixture
def in_one_kernel(monkeypatch):
    """Wide heads' gradients, where one kernel serves them, however short a sequence is."""
    monkeypatch.setattr(launch, "takes_one_kernel", lambda found, *_: found[-1].backward != found[0].backward)


@pytest.fixture
def every_lane_arrives(request, monkeypatch):
    """Kernels all of whose lanes arrive at a pipeline's barriers, not one for its warp; parametrized with False, the shipped
    ones. Either way they are of this test alone."""
    arrive = getattr(request, "param", True)
    plan, configs = launch.plan, launch.configs
    monkeypatch.setattr(launch, "plan", lambda *asked: replace(plan(*asked), every_lane_arrives=arrive))
    changed = lambda *asked: tuple(replace(config, every_lane_arrives=arrive) for config in configs(*asked))  # noqa: E731
    monkeypatch.setattr(launch, "configs", changed)
    for cached in (launch.prepared, launch._choices):
        cached.cache_clear()
    yield
    for cached in (launch.prepared, launch._choices):
        cached.cache_clear()
