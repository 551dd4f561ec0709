// A service worker that isolates the page from other sites, which browsers ask for before WebAssembly may use threads. Servers that send
// these two headers themselves do not need it.

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  if (new URL(event.request.url).origin !== self.location.origin) return;
  event.respondWith(
    fetch(event.request).then((response) => {
      if (response.status === 0) return response;
      const headers = new Headers(response.headers);
      headers.set("Cross-Origin-Opener-Policy", "same-origin");
      headers.set("Cross-Origin-Embedder-Policy", "require-corp");
      const empty = [101, 204, 205, 304].includes(response.status);
      return new Response(empty ? null : response.body, { status: response.status, statusText: response.statusText, headers });
    }),
  );
});
