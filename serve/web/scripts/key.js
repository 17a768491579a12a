// API keys: the page asks for a key after a response 401, keeps it for this tab, and sends it to this server only.

const form = document.getElementById("key-form"), field = document.getElementById("key");

/** Like the browser's fetch, but with the key as the header Authorization. */
export async function fetch_with_key(input, init = {}) {
  const key = sessionStorage.getItem("key"), headers = new Headers(init.headers);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  const response = await fetch(input, {...init, headers});
  if (response.status === 401) {
    if (key) document.getElementById("key-text").textContent = "This server does not accept that key. Please enter another one.";
    form.hidden = false;
  } else if (response.ok) form.hidden = true;
  return response;
}

/** Call `then` after a key was entered. */
export function on_key(then) {
  form.onsubmit = event => {
    event.preventDefault();
    sessionStorage.setItem("key", field.value.trim());
    field.value = "";
    then();
  };
}
