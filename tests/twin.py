"AdaHessian written out from the paper's algorithm 1, without fastai and without this package: what the optimizer is compared with"
import torch
from torch.autograd import grad


def hessian_times(loss, params, zs):
    "Hz for each of `params`, from the gradient of gᵀz"
    gs = grad(loss, params, create_graph=True)
    gz = sum((g*z).sum() for g,z in zip(gs,zs))
    return [g.detach() for g in gs],list(grad(gz, params))


def spatial_average(d, block_length):
    "Equation 10 as the published code has it: means of |d| over kernels, and over runs of a flattened matrix"
    d = d.abs() if d.dim()>1 else d
    if d.dim()==2 and block_length>1:
        flat,out = d.flatten(),torch.empty(d.numel(), dtype=d.dtype)
        for i in range(0, d.numel(), block_length): out[i:i+block_length] = flat[i:i+block_length].mean()
        return out.view(d.shape)
    if d.dim()>2:
        out = torch.empty_like(d)
        for i in range(d.shape[0]):
            for j in range(d.shape[1]): out[i,j] = d[i,j].mean()
        return out
    return d


class Twin:
    "AdaHessian on groups of parameters, each a dict of `params` and hyperparameters"
    def __init__(self, groups, draw, block_length=32, update_each=1, n_samples=1, decouple_wd=True):
        self.groups,self.draw,self.block_length = groups,draw,block_length
        self.update_each,self.n_samples,self.decouple_wd = update_each,n_samples,decouple_wd
        self.params = [p for g in groups for p in g['params']]
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.t,self.h = 0,0

    def curvature(self, losses):
        "Mean gradient and mean z⊙Hz over `losses`, callables that are evaluated one after the other"
        g = [torch.zeros_like(p) for p in self.params]
        d = [torch.zeros_like(p) for p in self.params]
        for loss in losses:
            for s in range(self.n_samples):
                zs = [self.draw(p, None) for p in self.params]
                gs,hz = hessian_times(loss(), self.params, zs)
                for i in range(len(g)):
                    if s==0: g[i] += gs[i]/len(losses)
                    d[i] += zs[i]*hz[i]/len(losses)/self.n_samples
        return g,d

    def step(self, losses, **hypers):
        "One step on the mean of `losses`; `hypers` override those of all groups"
        if self.t%self.update_each==0:
            g,d = self.curvature(losses)
            self.h += 1
        else: g,d = [sum(o)/len(losses) for o in zip(*[grad(loss(), self.params) for loss in losses])],None
        self.t += 1
        i = 0
        for group in self.groups:
            hp = {**group, **hypers}
            for p in group['params']:
                self.move(i, p, g[i], None if d is None else d[i], hp)
                i += 1

    def move(self, i, p, g, d, hp):
        b1,b2 = hp['mom'],hp['sqr_mom']
        if self.decouple_wd: p.data = p.data - hp['lr']*hp['wd']*p.data
        else: g = g + hp['wd']*p.data
        self.m[i] = b1*self.m[i] + (1-b1)*g
        if d is not None: self.v[i] = b2*self.v[i] + (1-b2)*spatial_average(d, self.block_length)**2
        m_hat = self.m[i]/(1-b1**self.t)
        v_hat = self.v[i]/(1-b2**self.h)
        p.data = p.data - hp['lr']*m_hat/(torch.sqrt(v_hat)**hp['hessian_power'] + hp['eps'])


class AsItComes(Twin):
    "The package's own defaults over the paper's algorithm: a dense start, bounds on gradient and step, and the loss taken ahead of the parameters"
    def __init__(self, groups, draw, update_each=10, dense=20, rho=0.2, clip=3., cap=0.1, spike=2., **kwargs):
        super().__init__(groups, draw, **kwargs)
        self.k,self.dense,self.rho,self.clip,self.cap,self.spike = update_each,dense,rho,clip,cap,spike
        self.norms = []

    def step(self, losses, **hypers):
        home = [p.data.clone() for p in self.params]
        length = sum((m**2).sum() for m in self.m)**0.5
        if self.t>0:
            for p,m in zip(self.params, self.m): p.data = p.data - self.rho*m/length
        due,weight = (True,1/self.k) if self.t<self.dense else (self.t%self.k==0,1)
        if due: g,d = self.curvature(losses)
        else: g,d = [sum(o)/len(losses) for o in zip(*[grad(loss(), self.params) for loss in losses])],None
        for p,o in zip(self.params, home): p.data = o
        g = self.shortened(g)
        self.t += 1
        if due: self.h += weight
        i = 0
        for group in self.groups:
            hp = {**group, **hypers}
            for p in group['params']:
                self.move(i, p, g[i], None if d is None else d[i], weight, hp)
                i += 1

    def shortened(self, g):
        "A gradient longer than `spike` means of the lengths so far is cut to that length; the mean forgets by 0.9 a step"
        n,t = sum((o**2).sum() for o in g).item()**0.5,len(self.norms)
        mean = sum(0.1*0.9**(t-1-i)*o for i,o in enumerate(self.norms))/(1-0.9**t) if t else n
        short = min(n, self.spike*mean)
        self.norms.append(short)
        return [o*(short/n) for o in g]

    def move(self, i, p, g, d, weight, hp):
        b1,b2 = hp['mom'],hp['sqr_mom']
        p.data = p.data - hp['lr']*hp['wd']*p.data
        self.m[i] = b1*self.m[i] + (1-b1)*g
        if d is not None: self.v[i] = b2**weight*self.v[i] + (1-b2**weight)*spatial_average(d, self.block_length)**2
        u = self.m[i]/(1-b1**self.t)/(torch.sqrt(self.v[i]/(1-b2**self.h))**hp['hessian_power'] + hp['eps'])
        rms = u.pow(2).mean()**0.5
        u = torch.minimum(torch.maximum(u, -self.clip*rms), self.clip*rms)
        p.data = p.data - hp['lr']*u*min(1., self.cap/rms.item())
