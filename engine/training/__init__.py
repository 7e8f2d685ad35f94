"""Fine-tuning of adapters, in the order in which a run meets the modules.

===============  ================================================================================
`data`           a text to samples, their shuffle, and batches of rows
`conversations`  lines of JSON to samples of which only the answers count
`validation`     data that are watched and not trained on, and their loss
`trainer`        a batch to its loss and the adapter's gradient
`resources`      memory that is left and memory that is planned, a measured speed
`schedule`       factor on the learning rate by iteration
`optimizer`      the gradient to new parameters (AdamW)
`moments`        the order of parameters inside a checkpoint's moment vectors
`state`          what changes while training and is kept between runs
`checkpoint`     that state as a file, written and read
`report`         figures of an iteration; how durations, bars and names are written
`log`            those figures as a table and as a picture
`learning`       proof that a run has taught something
`loop`           the order of events: data, trainer, optimizer, checkpoint
===============  ================================================================================
"""
