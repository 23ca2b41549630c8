"Small tensors are fastest on one thread, and two test processes then do not fight for the cores"
import pytest,torch
import fastai.callback.fp16 as fp16

torch.set_num_threads(1)


@pytest.fixture
def cpu_amp(monkeypatch):
    "`learn.to_fp16()` and `learn.to_bf16()` as they are, with autocast and `GradScaler` of the CPU"
    monkeypatch.setattr(fp16, 'autocast', lambda device,**kw: torch.amp.autocast('cpu', **kw))
    monkeypatch.setattr(fp16, 'GradScaler', lambda device,**kw: torch.amp.GradScaler('cpu', **kw))


def pytest_addoption(parser): parser.addoption('--steps', type=int, default=50, help='steps of each variant on several processes')

@pytest.fixture(scope='session')
def n_steps(request): return request.config.getoption('--steps')
