"""softmax, log_softmax and logsumexp, by the online recurrence.

A call goes one way: ``api`` has every argument checked (``check``) and says what is asked for
(``problem``); NumPy arrays go to ``cpu``, GPU arrays to ``gpu``, where ``layout`` folds the axes,
``plan`` chooses a kernel and ``jit`` launches it. Two kernels read the same two headers: in
``rows.cu`` neighbouring threads share a row, in ``columns.cu`` they have neighbouring rows.
"""
