"Moved to `schedule`"
from ._moved import moved

__getattr__ = moved(__name__, Budget='schedule.Budget', check_period='schedule.check_period', is_due='schedule.is_due',
    check_rows='schedule.check_rows', rows_due='schedule.rows_due', least_part='schedule.least_part')
