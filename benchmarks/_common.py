"What the benchmarks share: where results go, what machine and versions they are of, a file that grows row by row"
import csv,fcntl,importlib.metadata,os,platform,re,subprocess,tempfile
from pathlib import Path

import torch

import adahessian_fastai

RESULTS = Path(__file__).parent/'results'

def results_dir(smoke=False):
    "Where result files go; those of a smoke run are thrown away"
    return Path(tempfile.mkdtemp(prefix='smoke_')) if smoke else RESULTS

def cpu_name():
    info = Path('/proc/cpuinfo')
    return re.search(r'model name\s*: (.*)', info.read_text())[1].strip() if info.exists() else platform.processor()

def machine(device='cpu', packages=('torch','fastai')):
    "Hardware and versions in a line"
    versions = ', '.join(f'{o} {importlib.metadata.version(o)}' for o in packages)
    where = torch.cuda.get_device_name() if device=='cuda' else f'{cpu_name()}, {torch.get_num_threads()} thread(s)'
    return f'{where}, Python {platform.python_version()}, {versions}, adahessian_fastai {adahessian_fastai.__version__} {commit()}'.strip()

def commit():
    "The commit that the package is of, with a + where files differ from it; nothing where there is no git"
    try: return subprocess.run(['git','describe','--always','--dirty=+'], cwd=RESULTS, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError: return ''

def threads(): return int(os.environ.get('OMP_NUM_THREADS', 1))

def append(path, row):
    "Add `row`, a dict, to the CSV file at `path`, which several processes may do at once"
    with path.open('a', newline='') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        out = csv.DictWriter(f, list(row), lineterminator='\n')
        if not f.seek(0, os.SEEK_END): out.writeheader()
        out.writerow(row)
