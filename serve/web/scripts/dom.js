// Short names for what every script of the page does with its elements.

export const $ = id => document.getElementById(id);
export const show = (id, on) => { $(id).hidden = !on; };

/** Let screen readers say a text. */
export const say = text => { $("said").textContent = text; };

/** Return a new element with these properties; names that begin with "aria-" are set as attributes. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

export const bytes_of = base64 => Uint8Array.from(atob(base64), one => one.charCodeAt(0));
export const png_blob = bytes => new Blob([bytes], {type: "image/png"});

/** Save a blob as a file. */
export function download(blob, name) {
  const link = element("a", {href: URL.createObjectURL(blob), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
