"""One rank of a data-parallel training of graph classifiers: FILE gets the gradient norms and the steps' weights."""

import os
import sys

import timm
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from timm_mldecoder.models.graph import add_graph_classifier

distributed.init_process_group('gloo')
rank, result = distributed.get_rank(), {}
for layer in ('gcn', 'gat'):
    torch.manual_seed(0)
    adjacency = torch.rand(4, 4).fill_diagonal_(0)
    model = add_graph_classifier(
        timm.create_model('test_resnet', num_classes=4), adjacency, torch.randn(4, 6), layer=layer
    )
    parallel = DistributedDataParallel(model)  # an unused parameter is an error in the second step
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for step in range(3):
        torch.manual_seed(1 + 10 * rank + step)
        optimizer.zero_grad()
        parallel(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    graph = model.get_classifier()
    result[layer] = {name: parameter.detach() for name, parameter in graph.named_parameters()}
    result[f'{layer} without gradient'] = [name for name, value in model.named_parameters() if value.grad is None]
torch.save(result, f'{sys.argv[1]}.{os.environ["RANK"]}')
distributed.destroy_process_group()
