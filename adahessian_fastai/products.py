"Moved to `curvature`"
from ._moved import moved

__getattr__ = moved(__name__, kinks='curvature.nonsmooth', graph_kinks='curvature.nonsmooth_graph',
    kinked_modules='curvature.nonsmooth_modules', kinked_functions='curvature.nonsmooth_functions', max_error='curvature.max_error',
    relative_error='curvature.relative_error', Ride='curvature.Ride', batch_statistics='curvature.batch_statistics',
    compile_product='curvature.compile_product', choose_product='curvature.choose_way')
