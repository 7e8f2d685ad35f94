"""Fine-tuning of adapters, in the order in which a run meets the modules.

=============  ==================================================================================
`data`         a text to samples, their shuffle, and batches of rows
`trainer`      a batch to its loss and the adapter's gradient
`schedule`     factor on the learning rate by iteration
`optimizer`    the gradient to new parameters (AdamW)
`moments`      the order of parameters inside a checkpoint's moment vectors
`state`        what changes while training and is kept between runs
`checkpoint`   that state as a file, written and read
`report`       figures of an iteration; how durations, bars and names are written
`loop`         the order of events: data, trainer, optimizer, checkpoint
=============  ==================================================================================
"""
