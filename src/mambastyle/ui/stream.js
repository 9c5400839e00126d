// Keeps a visitor's stream of results open while one is owed.
//
// Gradio sends all results of a page through one stream and closes it when none is left. A press on a button that
// reaches the server after that, but whose answer reaches the browser before the closing, belongs to no stream:
// the client believes that the old one is open, and waits for ever. So the closing is held back here until every
// press that is under way has its answer; if one of them has no result yet, a new stream takes the old one's place.
(() => {
  const original = window.fetch.bind(window);
  const joining = new Set(); // presses that the server has not answered
  const owed = new Set(); // events without a result
  const completed = new Set(); // a result may come before the answer to its press

  const note = (answer) =>
    answer
      .then((response) => response.clone().json())
      .then(({ event_id }) => completed.delete(event_id) || (event_id && owed.add(event_id)))
      .catch(() => {}); // refused, or cut off: the client reads the same answer and says so

  async function* relayed(request, body) {
    while (body) {
      let rest = "";
      let closing = null;
      for await (const text of body.pipeThrough(new TextDecoderStream())) {
        const records = (rest + text).split("\n\n");
        rest = records.pop();
        for (const record of records) {
          const message = JSON.parse(record.slice(record.indexOf(":") + 1));
          if (message.msg === "process_completed" && !owed.delete(message.event_id)) {
            completed.add(message.event_id);
          }
          if (message.msg === "close_stream") {
            await Promise.all(joining);
            closing = owed.size ? record + "\n\n" : null;
          }
          if (!closing) yield record + "\n\n";
        }
      }
      // A stream that ended otherwise, or cannot be had again, is the client's to report.
      const next = closing && (await original(request.clone()));
      body = next?.ok ? next.body : null;
      if (closing && !body) yield closing;
    }
  }

  window.fetch = async (resource, options) => {
    const path = new URL(resource.url ?? resource, location.href).pathname;
    if (path.endsWith("/queue/join")) {
      const answer = original(resource, options);
      const noted = note(answer);
      joining.add(noted);
      await noted;
      joining.delete(noted);
      return answer;
    }
    if (path.endsWith("/queue/data")) {
      const request = new Request(resource, options);
      const response = await original(request.clone());
      if (!response.ok) return response;
      const records = relayed(request, response.body);
      const body = new ReadableStream({
        async pull(controller) {
          const { value, done } = await records.next();
          if (done) controller.close();
          else controller.enqueue(value);
        },
        cancel: () => records.return(),
      });
      return new Response(body.pipeThrough(new TextEncoderStream()), response);
    }
    return original(resource, options);
  };
})();
