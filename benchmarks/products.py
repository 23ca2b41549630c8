"""Hessian-vector products and the largest eigenvalue beside `curvlinops`: the same numbers, and the time of each.

    python benchmarks/products.py

Times are medians on one thread. `hessian_product` evaluates the loss for each product, as curvlinops does; `graph_product` keeps one graph for all of them.
"""
import statistics,time

import torch
from curvlinops import HessianLinearOperator
from scipy.sparse.linalg import eigsh
from torch import nn

from adahessian_fastai.hvp import gradient,graph_product,hessian_product
from adahessian_fastai.spectrum import extreme_eigenvalues

def mlp(): return nn.Sequential(nn.Linear(100,200), nn.Tanh(), nn.Linear(200,200), nn.Tanh(), nn.Linear(200,10))
def conv(): return nn.Sequential(nn.Conv2d(3,16,3), nn.GELU(), nn.Conv2d(16,32,3,stride=2), nn.GELU(), nn.Flatten(), nn.Linear(6272,10))

MODELS = dict(mlp=(mlp, (128,100)), conv=(conv, (16,3,32,32)))

def milliseconds(f, n=15):
    "Median time of `f()` after one call to warm up"
    f()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter()-start)
    return 1e3*statistics.median(times)

def compare(name):
    "One line of numbers for the model `name`"
    make,shape = MODELS[name]
    torch.manual_seed(0)
    model,x,y,loss_func = make(),torch.randn(shape),torch.randint(0, 10, (shape[0],)),nn.CrossEntropyLoss()
    params = list(model.parameters())
    loss = lambda: loss_func(model(x), y)
    theirs = HessianLinearOperator(model, loss_func, params, [(x, y)], check_deterministic=False)
    fresh,kept = hessian_product(loss, params),graph_product(gradient(loss(), params, create_graph=True), params)
    v = [torch.randn_like(p) for p in params]
    error = max((a-b).abs().max().item() for a,b in zip(fresh(v), theirs@v))
    times = {k: milliseconds(lambda: f(v)) for k,f in dict(hessian_product=fresh, graph_product=kept).items()}
    times['curvlinops'] = milliseconds(lambda: theirs@v)
    eig,other = extreme_eigenvalues(kept, params),eigsh(theirs.to_scipy(), k=1, which='LA', tol=1e-4, return_eigenvectors=False)[0]
    line = ', '.join(f'{k} {t:.2f} ms' for k,t in times.items())
    print(f"{name}: {line}; largest difference {error:.1g}; largest eigenvalue {eig.values[0]:.6f} ± {eig.bounds[0]:.1g} in {eig.n_products} products, eigsh {other:.6f}")

if __name__=='__main__':
    torch.set_num_threads(1)
    for name in MODELS: compare(name)
