"""How noisy is one estimate of the diagonal on a trained network, and who lowers the noise? A small convolutional network and a small Transformer on handwritten digits.

    python benchmarks/estimators_noise.py
    python benchmarks/estimators_noise.py --smoke    # does it run? Seconds

The truth is the mean of many estimates. All numbers are relative to its norm: root mean square error of one estimate over all entries.
"""
import argparse

import torch
from fastai.basics import *
from fastai.layers import ConvLayer
from sklearn.datasets import load_digits
from torch.nn.attention import SDPBackend,sdpa_kernel

from adahessian_fastai.averaging import average_diag
from adahessian_fastai.curvature import GaussNewton,Hessian
from adahessian_fastai.losses import gnb_samples,label_noise
from adahessian_fastai.hutchinson import control_variate_samples,hutchinson_samples,sample_mean
from adahessian_fastai.problem import Problem

curvatures = dict(hessian=Hessian(), ggn=GaussNewton())


class Transformer(nn.Module):
    "Eight rows of an image as a sequence"
    def __init__(self, d=16):
        super().__init__()
        self.embed,self.pos = nn.Linear(8,d),nn.Parameter(torch.randn(8,d)*.1)
        self.layer,self.out = nn.TransformerEncoderLayer(d, 2, 2*d, dropout=0., batch_first=True),nn.Linear(d,10)
    def forward(self, x): return self.out(self.layer(self.embed(x[:,0]) + self.pos).mean(1))


def conv_net(): return nn.Sequential(ConvLayer(1,8,norm_type=None), ConvLayer(8,16,stride=2,norm_type=None), nn.Flatten(), nn.Linear(256,10))


def trained(make, x, y, n=150):
    torch.manual_seed(0)
    net = make()
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(n):
        i = torch.randint(len(x), (64,))
        opt.zero_grad()
        F.cross_entropy(net(x[i]), y[i]).backward()
        opt.step()
    return net


def flat(ts): return torch.cat([t.detach().flatten() for t in ts])


def noises(net, x, y, n, n_truth):
    "Name, relative noise and shares of negative entries for each kind of estimate"
    ps,gen,out = list(net.parameters()),torch.Generator().manual_seed(0),net(x)
    problem = Problem(ps, F.cross_entropy(out, y), out, y, F.cross_entropy, model=net)
    product = {k: f(problem, ps).product for k,f in curvatures.items()}
    rademacher = lambda n, k='hessian', s=1: (sample_mean(hutchinson_samples(product[k], ps, s, 'rademacher', gen)) for _ in range(n))
    d = {k: sample_mean(rademacher(n_truth, k)) for k in curvatures}
    c = sample_mean(rademacher(min(n_truth, 100)))
    kernels = lambda ts: [average_diag(t, 32, True) for t in ts]
    rows = {'Rademacher': (rademacher(n), d['hessian']), '4 Rademacher': (rademacher(n, s=4), d['hessian']),
        'Gaussian': (hutchinson_samples(product['hessian'], ps, n, 'gaussian', gen), d['hessian']),
        'Gaussian, control variate from 100 estimates': (control_variate_samples(product['hessian'], ps, c, n, 'gaussian', gen), d['hessian']),
        'Gaussian, control variate from the truth': (control_variate_samples(product['hessian'], ps, d['hessian'], n, 'gaussian', gen), d['hessian']),
        'Rademacher, mean of signed blocks': (map(kernels, rademacher(n)), kernels(d['hessian'])),
        'Gauss-Newton, Rademacher': (rademacher(n, 'ggn'), d['ggn']),
        'Gauss-Newton-Bartlett': (gnb_samples(out, ps, label_noise(F.cross_entropy, out, y), n, gen), d['ggn'])}
    for name,(samples,truth) in rows.items():
        D,truth = torch.stack([flat(s) for s in samples]),flat(truth)
        yield name,((D-truth).square().sum(1).mean().sqrt()/truth.norm()).item(),(D<0).double().mean().item()


def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=300, help='estimates of each kind')
    p.add_argument('--truth', type=int, default=3000, help='estimates whose mean is the truth')
    p.add_argument('--smoke', action='store_true', help='two estimates of networks that have just begun to train')
    args = p.parse_args(args)
    if args.smoke: args.n,args.truth = 2,2
    x,y = load_digits(return_X_y=True)
    x,y = torch.tensor(x, dtype=torch.float).view(-1,1,8,8)/8-1,torch.tensor(y)
    for name,make in (('convolutional network', conv_net), ('Transformer', Transformer)):
        with sdpa_kernel(SDPBackend.MATH):
            net = trained(make, x, y, 2 if args.smoke else 150)
            print(f"\n{name}, {sum(p.numel() for p in net.parameters())} parameters, batch of 64\n\n| estimate | noise | below 0 |\n|---|---|---|")
            for row,noise,below in noises(net, x[:64], y[:64], args.n, args.truth): print(f"| {row} | {noise:.2f} | {below:.2f} |", flush=True)


if __name__=='__main__': main()
