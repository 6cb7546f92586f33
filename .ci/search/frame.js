// Browsers start no worker from a file. Where the site is opened without a server, the search runs in a hidden frame.
"use strict"
if (location.protocol === "file:")
  window.Worker = class {
    constructor(address) {
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const room = this.frame.contentWindow
      room.postMessage = data => this.onmessage?.({ data })
      const script = room.document.createElement("script")
      this.ready = new Promise((resolve, reject) => {
        script.onload = resolve
        script.onerror = reject
      })
      script.src = address
      room.document.body.append(script)
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.onmessage({ data }), error => this.onerror?.(error))
    }

    terminate() {
      this.frame.remove()
    }
  }
