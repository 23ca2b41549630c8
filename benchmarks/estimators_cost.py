"""What a step costs with each estimate, in steps of Adam: processor time on one thread, the best of several short runs.

    python benchmarks/estimators_cost.py
    python benchmarks/estimators_cost.py --smoke    # does it run? Seconds
"""
import argparse,time

import torch
from fastai.basics import *
from fastai.callback.all import *
from fastai.layers import ConvLayer

from adahessian_fastai.adahessian import adahessian
from adahessian_fastai.sophia import sophia

each = partial(adahessian, update_each=1) # An estimate at each step
MODELS = {
    'convolutions': lambda: nn.Sequential(ConvLayer(3,16), ConvLayer(16,32,stride=2), ConvLayer(32,64,stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64,10)),
    'dense layers': lambda: nn.Sequential(nn.Flatten(), nn.Linear(768,256), nn.Tanh(), nn.Linear(256,256), nn.Tanh(), nn.Linear(256,10))}
VARIANTS = {'Adam': Adam, 'adahessian': each, "curvature='ggn'": partial(each, curvature='ggn'), "estimator='gnb'": partial(each, estimator='gnb'),
    **{f'hessian_bs={b}': partial(each, hessian_bs=b) for b in (1.,0.5,0.25,0.125)},
    "estimator='gnb', hessian_bs=0.25": partial(each, estimator='gnb', hessian_bs=0.25), 'sophia': sophia}


def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=6)
    p.add_argument('--bs', type=int, default=128)
    p.add_argument('--smoke', action='store_true', help='one round of batches of 2')
    args = p.parse_args(args)
    if args.smoke: args.rounds,args.bs = 1,2
    torch.set_num_threads(1)
    x,y = torch.randn(10*args.bs,3,16,16),torch.randint(10, (10*args.bs,))
    dls = DataLoaders.from_dsets(list(zip(x,y)), [], bs=args.bs, num_workers=0)
    for name,make in MODELS.items():
        learns,best = {k: Learner(dls, make(), CrossEntropyLossFlat(), opt_func=o) for k,o in VARIANTS.items()},{}
        for _ in range(args.rounds):
            for k,learn in learns.items():
                start = time.process_time()
                with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-3)
                best[k] = min(best.get(k, math.inf), time.process_time()-start)
        print(f"\n{name}, batch of {args.bs}, a step of Adam takes {best['Adam']*100:.1f} ms\n\n| optimizer | steps of Adam |\n|---|---|")
        for k,v in best.items(): print(f"| {k} | {v/best['Adam']:.2f} |")


if __name__=='__main__': main()
