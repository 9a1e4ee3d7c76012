// What happens in the browser alone: the open tab, the views of a comparison, and full screen.
(() => {
  const FLICKER_MS = 600
  const root = () => document.getElementById('comparison')
  const sides = () => [...root().querySelectorAll('#stage .side')]
  const pictures = side => [...side.querySelectorAll('.tile img')]

  // --- views: side by side, slider, flicker, difference; kept while previews replace the stage
  let at = 50, second = 'B', shown = 0
  function settle() {
    if (!root()) return
    const all = sides()
    if (!all.some(side => side.dataset.side === second)) second = 'B'
    all.forEach((side, i) => {
      side.classList.toggle('first', i === 0)
      side.classList.toggle('second', side.dataset.side === second)
      side.classList.toggle('on', i === shown % all.length)
    })
    root().querySelectorAll('[data-second]').forEach(button => button.setAttribute('aria-pressed', button.dataset.second === second))
    root().querySelectorAll('.divider').forEach(divider => { divider.value = at })
    root().style.setProperty('--at', at / 100)
    if (root().dataset.view === 'difference') all.slice(1).forEach(side => showDifference(all[0], side))
  }
  window.showView = view => { root().dataset.view = view; settle() }
  const flick = () => { shown += 1; settle() }
  const calm = matchMedia('(prefers-reduced-motion: reduce)')  // then a button does it
  setInterval(() => {
    const keysNeedIt = root()?.querySelector(':focus-visible')
    if (root()?.dataset.view === 'flicker' && !document.hidden && !calm.matches && !keysNeedIt) flick()
  }, FLICKER_MS)

  // |X - A|, exact for each colour; the caption tells its mean
  async function showDifference(a, x) {
    const pairs = pictures(x).map((picture, i) => [pictures(a)[i], picture]).filter(([one, other]) => one && other)
    let sum = 0, count = 0
    for (const [one, other] of pairs) {
      try { await Promise.all([one.decode(), other.decode()]) } catch { return }  // replaced meanwhile
      const [p, q] = [pixels(one), pixels(other)]
      if (p.length !== q.length) { x.querySelector('.measured').textContent = 'other size than A'; return }
      const canvas = other.parentElement.querySelector('canvas') ?? other.parentElement.appendChild(document.createElement('canvas'))
      canvas.width = other.naturalWidth
      canvas.height = other.naturalHeight
      const image = new ImageData(canvas.width, canvas.height)
      for (let i = 0; i < q.length; i++) {
        const difference = i % 4 === 3 ? 255 : Math.abs(p[i] - q[i])
        image.data[i] = difference
        if (i % 4 !== 3) { sum += difference; count++ }
      }
      canvas.getContext('2d').putImageData(image, 0, 0)
    }
    const mean = count ? (sum / count).toFixed(1) : '0'
    x.querySelector('.measured').textContent = `|${x.dataset.side} − A|, mean ${mean} of 255`
  }
  function pixels(picture) {
    const canvas = document.createElement('canvas')
    canvas.width = picture.naturalWidth
    canvas.height = picture.naturalHeight
    const context = canvas.getContext('2d', { willReadFrequently: true })
    context.drawImage(picture, 0, 0)
    return context.getImageData(0, 0, canvas.width, canvas.height).data
  }

  // --- full screen: image i of all sides, as large as whole multiples allow
  let viewer, index = 0, gallery = []
  function open(tile) {
    gallery = [...tile.closest('.stage').querySelectorAll('.side')]
    index = Number(tile.dataset.index)
    if (!viewer) {
      viewer = document.body.appendChild(document.createElement('dialog'))
      viewer.id = 'viewer'
      viewer.setAttribute('aria-label', 'Full screen')
      viewer.tabIndex = -1  // keeps the keys where the button that had the focus is gone
      viewer.addEventListener('click', event => { if (event.target === viewer) viewer.close() })
      viewer.addEventListener('keydown', event => {
        const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key]
        if (way) { event.preventDefault(); turn(way) }
      })
    }
    viewer.showModal()
    turn(0)
  }
  function turn(way) {
    const most = Math.max(...gallery.map(side => pictures(side).length))
    index = (index + way + most) % most
    const pressed = document.activeElement?.getAttribute('aria-label')
    const column = innerWidth < 640 && gallery.length > 1
    const [wide, high] = column ? [innerWidth - 32, (innerHeight - 120) / gallery.length - 72] : [(innerWidth - 48) / gallery.length - 24, innerHeight - 190]
    viewer.replaceChildren(bar(most), Object.assign(document.createElement('div'), { className: 'pair' }))
    for (const side of gallery) {
      const picture = pictures(side)[index]
      if (!picture) continue
      const figure = viewer.lastChild.appendChild(document.createElement('figure'))
      const large = figure.appendChild(picture.cloneNode())
      const scale = Math.max(1, Math.floor(Math.min(wide / picture.naturalWidth, high / picture.naturalHeight)))
      large.width = scale * picture.naturalWidth
      large.height = scale * picture.naturalHeight
      const caption = figure.appendChild(document.createElement('figcaption'))
      caption.append(side.querySelector('.letter').textContent + ' ', side.querySelector('.name').textContent)
      const flag = side.querySelector('.flag')
      if (flag) caption.append(' ', flag.cloneNode(true))
      const file = picture.parentElement.dataset.file
      if (file) caption.append(Object.assign(document.createElement('a'), { href: picture.src, download: file, textContent: 'Download PNG' }))
    }
    const again = way && [...viewer.querySelectorAll('button')].find(button => button.getAttribute('aria-label') === pressed)
    ;(again || viewer).focus()
  }
  function bar(most) {
    const element = Object.assign(document.createElement('div'), { className: 'bar' })
    const button = (words, label, act) => {
      const made = Object.assign(document.createElement('button'), { type: 'button', textContent: words, onclick: act })
      made.setAttribute('aria-label', label)
      return made
    }
    const place = Object.assign(document.createElement('span'), { textContent: `image ${index + 1} of ${most}` })
    element.append(button('←', 'Previous image', () => turn(-1)), place, button('→', 'Next image', () => turn(1)), button('Close', 'Close full screen', () => viewer.close()))
    return element
  }

  // --- the open tab stands in the address: links lead to it, and it stays open when the page is loaded anew, as after its restart
  const tabs = () => [...document.querySelectorAll('.tab-container:not([aria-hidden="true"]) [role="tab"]')]
  const address = tab => tab === tabs()[0] ? '' : '#' + tab.textContent.trim().toLowerCase().replaceAll(' ', '-')
  const openTab = () => {
    const tab = tabs().find(tab => address(tab) === location.hash)
    if (tab?.getAttribute('aria-selected') === 'false') tab.click()
    return tab
  }
  addEventListener('popstate', openTab)  // back and forth, and a link to another tab
  const built = new MutationObserver(() => { if (tabs().length) { built.disconnect(); openTab() } })
  built.observe(document, { childList: true, subtree: true })
  document.addEventListener('click', event => {
    const tab = tabs().find(tab => tab === event.target.closest?.('[role="tab"]'))
    if (tab && address(tab) !== location.hash) history.pushState(null, '', address(tab) || location.pathname + location.search)
  })

  document.addEventListener('click', event => {
    const tile = event.target.closest?.('.tile'), pick = event.target.closest?.('[data-second]')
    if (pick) { second = pick.dataset.second; settle() }
    else if (event.target.closest?.('.flick')) flick()
    else if (tile) open(tile)
  })
  document.addEventListener('input', event => {
    if (!event.target.classList?.contains('divider')) return
    at = event.target.value
    root().style.setProperty('--at', at / 100)
  })
  // new sides, or new images in the old ones, whose classes are then those of the markup; what `settle` itself changes is left out
  const isNew = change => change.attributeName || !['SPAN', 'BUTTON'].includes(change.target.tagName)
  new MutationObserver(changes => {
    if (changes.some(change => change.target.closest?.('#stage') && isNew(change))) settle()
  }).observe(document, { childList: true, subtree: true, attributeFilter: ['src'] })
})()
