"""What ``regraft report`` writes: one HTML file that shows what the patch does.

::

    measure.py   runs the probe graphs over images;  measurement.py  the norms and attention kept
    scales.py    numbers to places on an axis or a colour bar, and their ticks
    colours.py   the colour tables and the colour bars
    maps.py      one image: the picture, norm maps and attention maps
    charts.py    axes, lines and legends as SVG;  figures.py  the charts over the set
    tables.py    controls, parity, figures by layer;  wording.py  numbers and the headline
    markup.py    elements that escape what they hold;  page.py  the whole page, with page.css, .js

The file fetches nothing: pictures are data URIs, and its content security policy forbids the rest.
"""
