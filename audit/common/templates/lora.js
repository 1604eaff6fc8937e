"use strict";
(() => {
  const look = document.getElementById("look");
  const [title, tiles] = [look.querySelector("h3"), look.querySelector(".tiles")];

  const figure = (image, ...caption) => {
    const made = document.createElement("figure");
    const text = document.createElement("figcaption");
    text.append(...caption);
    made.append(...[image].filter(Boolean), text);
    return made;
  };
  const copy = (element) => element?.cloneNode(true);
  const generation = (number) => {
    const made = document.getElementById(`made-${number}`);
    const caption = made.querySelector("figcaption").cloneNode(true);
    return figure(copy(made.querySelector("img")), ...caption.childNodes);
  };

  document.querySelector(".matrix").addEventListener("click", (event) => {
    const cell = event.target.closest("a");
    if (!cell) return;
    event.preventDefault();
    const row = document.getElementById(`image-${cell.dataset.image}`);
    const name = row.querySelector("bdi").title;
    title.textContent = `Similarity ${cell.textContent}`;
    tiles.replaceChildren(
      figure(copy(row.querySelector("img")), `training image ${name}`),
      generation(cell.hash.slice("#made-".length)),
      ...(cell.dataset.twin ? [generation(cell.dataset.twin)] : []),
    );
    look.showModal();
  });
  look.addEventListener("click", (event) => {
    if (event.target === look) look.close();
  });
})();
