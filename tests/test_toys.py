"Paths on functions with a known minimum, from the start points of the published pictures"
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
