"""softmax, log_softmax and logsumexp, by the online recurrence.

A call goes one way: ``api`` checks every argument and says what is asked for (``problem``); NumPy arrays
go to ``cpu``, GPU arrays to ``gpu``, where ``layout`` folds the axes, ``plan`` chooses a kernel and
``jit`` launches it. Two kernels read the same two headers: ``rows.cu`` shares a row between neighbouring
threads, ``columns.cu`` gives neighbouring threads neighbouring rows.
"""
