import pytest
import torch
from torch import nn

from hp_edit_trl.utils.offload import on_device


def test_a_module_comes_back_with_the_tensors_it_had():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).requires_grad_(False)
    module[2].weight = module[0].weight  # tied
    before = {name: (tensor, tensor.clone()) for name, tensor in module.state_dict(keep_vars=True).items()}
    with pytest.raises(KeyboardInterrupt), on_device(module, torch.device("meta")):
        assert all(tensor.is_meta for tensor in module.state_dict().values())
        assert module[2].weight is module[0].weight
        assert not any(parameter.requires_grad for parameter in module.parameters())
        raise KeyboardInterrupt
    for name, tensor in module.state_dict(keep_vars=True).items():
        same, values = before[name]
        assert tensor is same and tensor.equal(values)
