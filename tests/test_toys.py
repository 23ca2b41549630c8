"Paths on functions with a known minimum, from the start points of the published pictures"
from functools import partial

import torch
from adahessian_fastai.all import adahessian_paper as adahessian
from adahessian_fastai.toys import descend,plot_paths,quadratic,rastrigin,rosenbrock


def test_rosenbrock_comes_close_to_its_minimum():
    "The valley's floor is the hard part: 500 steps from 3.2 away end within 0.5 of (1,1), for each of three seeds"
    for seed in range(3):
        torch.manual_seed(seed)
        path = descend(rosenbrock, lambda p: adahessian(p, lr=2., wd=0.), (-2.,2.), 500)
        assert (path[-1]-torch.tensor([1.,1.])).norm()<0.5
        assert rosenbrock(path[-1])<0.1


def test_rastrigin_ends_in_the_minimum_of_its_basin():
    "A downhill method from (-2,3.5) ends in the egg box's next minimum, near (-2,3); it cannot know of (0,0)"
    path = descend(rastrigin, lambda p: adahessian(p, lr=0.5, wd=0.), (-2.,3.5), 500)
    x = path[-1].clone().requires_grad_()
    g, = torch.autograd.grad(rastrigin(x), x)
    assert (path[-1]-torch.tensor([-1.98991,2.98486])).norm()<0.01   # where 2x + 20π sin 2πx = 0
    assert g.norm()<0.05


def test_the_settings_of_the_published_pictures_end_at_the_minimum():
    "The root of the curvature and gradients clipped to norm 1, from (-2,2): other packages end at (0.9995, 0.999)"
    torch.manual_seed(0)
    path = descend(rosenbrock, lambda p: adahessian(p, lr=1., wd=0., hessian_power=0.5), (-2.,2.), 500, clip=1.)
    assert (path[-1]-torch.tensor([0.9995,0.999])).abs().max()<1e-3

def test_numbers_and_grids():
    xs = torch.meshgrid(torch.linspace(-1,1,3), torch.linspace(-1,1,3), indexing='xy')
    assert rosenbrock((1.,1.))==0 and rastrigin((0.,0.)).abs()<1e-5 and isinstance(rosenbrock((1.,2.)), torch.Tensor)
    f,A = quadratic(torch.tensor([1.,10.]))
    for point in ((0,1),(2,2)):
        x = torch.stack([o[point] for o in xs])
        assert torch.allclose(f(xs)[point], x@A@x/2) and torch.allclose(f(x), x@A@x/2)
    plot_paths(f, dict(a=torch.zeros(2,2)), (0,0))


def bowl(x): return (x**2).sum()/2

def test_a_path_by_hand():
    "Half of the way to (0,0) at each step, from whole numbers too; a gradient of length 5 becomes one of length 1"
    sgd = partial(torch.optim.SGD, lr=0.5)
    assert descend(bowl, sgd, (4,2), 2).tolist()==[[4,2],[2,1],[1,0.5]]
    assert torch.allclose(descend(bowl, sgd, (3.,4.), 1, clip=1.)[1], torch.tensor([2.7,3.6]))
    assert descend(bowl, sgd, (4,2), 0).tolist()==[[4,2]]

def test_a_path_is_taken_where_rho_wants_the_loss():
    "The second gradient is that of the point ρ further along the step"
    step = partial(adahessian, lr=0.1, wd=0., mom=0.)
    plain,ahead = (descend(lambda x: (x**4).sum(), partial(step, rho=rho), (1.,1.), 3) for rho in (0.,0.2))
    assert torch.equal(plain[:2], ahead[:2]) and not torch.allclose(plain[2], ahead[2])

def test_a_quadratic_has_its_eigenvalues_and_repeats():
    e = torch.tensor([1.,10.,100.]).double()
    (f,A),(_,B) = (quadratic(e, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(A, B) and torch.allclose(torch.linalg.eigvalsh(A), e)
    assert torch.allclose(torch.autograd.functional.hessian(f, torch.ones(3).double()), A)
    assert f((1,2,3)).dtype==torch.double

def test_a_picture_has_x_to_the_right():
    seen = []
    ax = plot_paths(lambda g: seen.append(g) or g[0]**2+g[1]**2, dict(a=torch.zeros(2,2)), (0,0), ((-1.,1.),(0.,3.)))
    assert torch.equal(seen[0][0][0], torch.linspace(-1., 1., 200)) and torch.equal(seen[0][1][:,0], torch.linspace(0., 3., 200))
    assert (ax.get_xlim(),ax.get_ylim())==((-1,1),(0,3))
