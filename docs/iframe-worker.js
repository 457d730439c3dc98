// Pages opened from the disk may start no worker. There, the site's search runs in a frame instead.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc = "<!doctype html><title>search</title><body></body>"
      this.inner = new Promise((resolve, reject) => {
        this.frame.onload = () => {
          const inner = this.frame.contentWindow, script = inner.document.createElement("script")
          inner.postMessage = data => setTimeout(() => this.onmessage?.({data}))
          script.src = new URL(url, location.href)
          script.onload = () => resolve(inner)
          script.onerror = reject
          inner.document.body.append(script)
        }
      })
      this.inner.catch(error => this.onerror?.(error))
      document.body.append(this.frame)
    }
    postMessage(data) {
      this.inner.then(inner => inner.onmessage({data})).catch(error => this.onerror?.(error))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
