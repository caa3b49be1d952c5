"""What tests measure in a page that a browser shows."""

# Contrast of a place's text with what is behind it, and how light that is: WCAG 2.1's relative luminance.
CONTRAST = """(place) => {
  const part = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (colour) => {
    const [red, green, blue] = colour.match(/[0-9.]+/g).map((c) => part(Number(c) / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (one) => {
    const colour = getComputedStyle(one).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? behind(one.parentElement) : colour;
  };
  const one = document.querySelector(place);
  const [ink, paper] = [light(getComputedStyle(one).color), light(behind(one))];
  return [(Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05), paper];
}"""
