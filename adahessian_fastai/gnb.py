"Moved to `losses`"
from ._moved import moved

__getattr__ = moved(__name__, bare_loss='losses.bare_loss', label_noise='losses.label_noise', gnb_samples='losses.gnb_samples',
    softmax_noise='losses.softmax_noise', squared_error_noise='losses.squared_error_noise', binary_noise='losses.binary_noise',
    cross_entropy_weights='losses.cross_entropy_weights')
