"`python -m adahessian_fastai`: the command line of `adahessian_fastai.compare`; without arguments it is the demonstration on real digits"
import os,sys,warnings
# Both are read when torch is loaded: its memory profiler otherwise speaks of blocks that were there before it
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')
os.environ.setdefault('KINETO_LOG_LEVEL', '99')
warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated', category=FutureWarning)
from .compare import main

if __name__=='__main__':
    sys.argv[0] = 'adahessian-compare' # Its name in the help
    main()
