"""What is asked of a page in a browser."""

from __future__ import annotations

# Contrast (WCAG 2) of what is drawn or written with the paper: of each element that has text of its
# own, and of each line of a figure.
CONTRAST = """
() => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [R, G, B] = [r, g, b].map(v => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * R + 0.7152 * G + 0.0722 * B;
  };
  const ratio = (one, other) => {
    const [a, b] = [light(one), light(other)].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
  };
  const found = [];
  for (const element of document.querySelectorAll('main *')) {
    const style = getComputedStyle(element);
    const svg = element.closest('svg');
    const hasText = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (hasText && !['title', 'desc', 'style'].includes(element.tagName)) {
      found.push({what: element.textContent.trim().slice(0, 30), least: 4.5,
                  ratio: ratio(parse(svg ? style.fill : style.color), behind(element))});
    }
    if (element.tagName === 'use' && (element.getAttribute('style') || '').includes('--rate')) {
      found.push({what: 'point ' + style.fill, least: 3,
                  ratio: ratio(parse(style.fill), behind(element))});
    }
    if (svg && element.tagName === 'path' && style.stroke !== 'none') {
      const isGrid = element.getAttribute('style').includes('--grid');
      if (!isGrid) found.push({what: 'line ' + style.stroke, least: 3,
                               ratio: ratio(parse(style.stroke), behind(element))});
    }
  }
  return found;
}
"""
