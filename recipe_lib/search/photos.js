// Photos in: chosen, dropped or pasted; a strip of those that are there; one line that says what is going on.
// Files go to the kernel as messages: nothing of them stays in the widget's state, in a notebook or on a disk.
const LIMIT = 64 * 1024 * 1024; // bytes; the server takes messages of 96 MB

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export default {
  render({ model, el }) {
    const id = `ck-${Math.random().toString(36).slice(2)}`;
    const input = make("input", { type: "file", accept: "image/*", multiple: true, id, className: "ck-file" });
    const zone = make("label", { htmlFor: id, className: "ck-zone" },
      make("strong", { textContent: "Choose photos" }),
      make("span", { textContent: " or drop them here, or paste one. They stay in this computer's memory." }));
    const strip = make("div", { className: "ck-strip" });
    strip.setAttribute("role", "group");
    strip.setAttribute("aria-label", "Photos to search with");
    const progress = make("progress", { max: 1, hidden: true });
    progress.setAttribute("aria-label", "Progress");
    const status = make("p", { className: "ck-status" });
    status.setAttribute("role", "status");
    el.classList.add("ck");
    el.append(input, zone, strip, status, progress);

    async function send(files) {
      for (const [index, file] of [...files].entries()) {
        const bytes = file.size <= LIMIT ? [await file.arrayBuffer()] : [];
        model.send({ kind: "photo", name: file.name, index }, undefined, bytes);
      }
    }
    const shown = () => {
      strip.replaceChildren(...model.get("thumbs").map(({ label, src, own }, place) => {
        const picture = make("img", { src, alt: "" });
        const button = make("button", { type: "button", title: label, className: own ? "ck-own" : "" }, picture);
        button.setAttribute("aria-label", own ? `Your photo ${label}` : `Test photo: ${label}`);
        button.addEventListener("click", () => model.send({ kind: "choose", place }));
        return button;
      }));
      chosen();
    };
    const chosen = () => [...strip.children].forEach((button, place) =>
      button.setAttribute("aria-pressed", String(place === model.get("chosen"))));
    const told = () => {
      status.textContent = model.get("status");
      status.classList.toggle("ck-error", model.get("error"));
      progress.hidden = model.get("share") < 0;
      progress.value = Math.max(0, model.get("share"));
    };
    model.on("change:thumbs", shown);
    model.on("change:chosen", chosen);
    ["status", "error", "share"].forEach((name) => model.on(`change:${name}`, told));
    shown();
    told();

    input.addEventListener("change", async () => {
      await send(input.files);
      input.value = ""; // the same file again is a change too
    });
    // In JupyterLab other things are dropped beside the page; served alone, a miss must not replace it by the photo.
    document.getElementById("rendered_cells")?.setAttribute("role", "main");
    const area = "voila" in document.body.dataset ? document.body : el;
    const over = (event) => {
      event.preventDefault();
      zone.classList.toggle("ck-over", event.type === "dragover");
    };
    const dropped = (event) => {
      over(event);
      send(event.dataTransfer.files);
    };
    const pasted = (event) => send(event.clipboardData.files);
    area.addEventListener("dragover", over);
    area.addEventListener("dragleave", over);
    area.addEventListener("drop", dropped);
    document.addEventListener("paste", pasted);
    return () => {
      area.removeEventListener("dragover", over);
      area.removeEventListener("dragleave", over);
      area.removeEventListener("drop", dropped);
      document.removeEventListener("paste", pasted);
    };
  },
};
