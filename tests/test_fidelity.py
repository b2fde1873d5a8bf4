"""The sequential lines printed in docs/fidelity.md, run against the operators, so that the page can't drift from the code."""

import re
from pathlib import Path

import pytest
import torch
from checks import assert_close

from memzoo.kernels import delta_rule, linear_attention, linked_attention

PAGE = (Path(__file__).parent.parent / "docs" / "fidelity.md").read_text()


def printed(name):
    source = re.search(rf"<!-- sequential: {name} -->\n```python\n(.*?)```", PAGE, re.S).group(1)
    scope = {"torch": torch}
    exec(source, scope)
    return scope[name]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_sdnc(implementation):
    q, k, v = draw(1, 17, 2, 16), draw(1, 17, 2, 16), draw(1, 17, 2, 24)
    strength, retention, modes = 1 + draw(1, 17, 2).exp(), draw(1, 17, 2).sigmoid(), draw(1, 17, 2, 3).softmax(-1)
    y = linked_attention(
        q, k, v, modes, scale=0.3, key_strength=strength, log_retention=retention.log(), implementation=implementation
    )
    for h in range(2):
        expected = printed("sdnc")(q[0, :, h], k[0, :, h], v[0, :, h], 0.3, strength[0, :, h], retention[0, :, h], modes[0, :, h])
        assert_close(y[0, :, h], expected)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize(("write_rule", "normalize"), [("additive", True), ("additive", False), ("delta", False)])
def test_linear_transformer(implementation, write_rule, normalize):
    q, k = (torch.nn.functional.elu(draw(1, 40, 2, 16)) + 1 for _ in range(2))
    k = torch.nn.functional.normalize(k, dim=-1)
    v, log_decay, beta = draw(1, 40, 2, 24), -draw(1, 40, 2).exp(), draw(1, 40, 2).sigmoid()
    if write_rule == "additive":
        y, _ = linear_attention(q, k, v, log_decay, normalize=normalize, implementation=implementation)
    else:
        y, _ = delta_rule(q, k, v, beta, log_decay, implementation=implementation)
    for h in range(2):
        expected = printed("linear_transformer")(
            q[0, :, h], k[0, :, h], v[0, :, h], log_decay[0, :, h], beta[0, :, h], write_rule, normalize
        )
        assert_close(y[0, :, h], expected)


def test_every_architecture_has_its_table():
    from memzoo.models.registry import ARCHITECTURES

    for architecture in ARCHITECTURES:
        assert f"<!-- sequential: {architecture.model_type} -->" in PAGE
