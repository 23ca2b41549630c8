"""Hessian-vector products and the largest eigenvalue beside `curvlinops`: the same numbers, and the time of each.

    python benchmarks/products.py
    python benchmarks/products.py --smoke    # does it run? A second

curvlinops is left out where it is not installed.
Times are medians on one thread. `hessian_product` evaluates the loss for each product, as curvlinops does; `graph_product` keeps one graph for all of them.
"""
import argparse,statistics,time

import torch
from scipy.sparse.linalg import eigsh
from torch import nn

from adahessian_fastai.hvp import gradient,graph_product,hessian_product
from adahessian_fastai.spectrum import extreme_eigenvalues

def mlp(): return nn.Sequential(nn.Linear(100,200), nn.Tanh(), nn.Linear(200,200), nn.Tanh(), nn.Linear(200,10))
def conv(): return nn.Sequential(nn.Conv2d(3,16,3), nn.GELU(), nn.Conv2d(16,32,3,stride=2), nn.GELU(), nn.Flatten(), nn.Linear(6272,10))

MODELS = dict(mlp=(mlp, (128,100)), conv=(conv, (16,3,32,32)))
TINY = dict(tiny=(lambda: nn.Sequential(nn.Linear(4,3), nn.Tanh(), nn.Linear(3,10)), (8,4)))

def milliseconds(f, n=15):
    "Median time of `f()` after one call to warm up"
    f()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter()-start)
    return 1e3*statistics.median(times)

def operator(model, loss_func, params, data):
    "The Hessian of curvlinops, `None` where it is not installed"
    try: from curvlinops import HessianLinearOperator
    except ImportError: return None
    return HessianLinearOperator(model, loss_func, params, [data], check_deterministic=False)

def compare(name, make, shape, n=15):
    "One line of numbers for a model"
    torch.manual_seed(0)
    model,x,y,loss_func = make(),torch.randn(shape),torch.randint(0, 10, (shape[0],)),nn.CrossEntropyLoss()
    params = list(model.parameters())
    loss = lambda: loss_func(model(x), y)
    theirs = operator(model, loss_func, params, (x, y))
    fresh,kept = hessian_product(loss, params),graph_product(gradient(loss(), params, create_graph=True), params)
    v = [torch.randn_like(p) for p in params]
    times = {k: milliseconds(lambda: f(v), n) for k,f in dict(hessian_product=fresh, graph_product=kept).items()}
    eig = extreme_eigenvalues(kept, params)
    line = f"largest eigenvalue {eig.values[0]:.6f} ± {eig.bounds[0]:.1g} in {eig.n_products} products"
    if theirs is not None:
        times['curvlinops'] = milliseconds(lambda: theirs@v, n)
        error = max((a-b).abs().max().item() for a,b in zip(fresh(v), theirs@v))
        other = eigsh(theirs.to_scipy(), k=1, which='LA', tol=1e-4, return_eigenvectors=False)[0]
        line += f", eigsh {other:.6f}; largest difference of a product {error:.1g}"
    print(f"{name}: {', '.join(f'{k} {t:.2f} ms' for k,t in times.items())}; {line}")

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--smoke', action='store_true', help='a tiny network, one timing')
    args = p.parse_args(args)
    torch.set_num_threads(1)
    for name,(make,shape) in (TINY if args.smoke else MODELS).items(): compare(name, make, shape, 1 if args.smoke else 15)

if __name__=='__main__': main()
