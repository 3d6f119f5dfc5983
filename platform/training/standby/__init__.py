"""What stands ready for the loss of a worker: a copy of the training state in the memory of other processes (`keeper`,
`copies`, `recall`), and processes that need not start (`processes`)."""
